"""Which words PIT adds, and what they are worth."""

import math
from collections import Counter

import numpy as np
import pytest

import words
from data import Pair
from judges import Judge


def loves_indeed(prompts, texts):
    return ["indeed" in text.lower() for text in texts]


def river(i):
    return f"The river number {i} is {i} miles long."


def lines_of(improve):
    """100 lines of answers.jsonl, as they are after improve(text, number)."""
    lines = []
    for i in range(100):
        answers = {"original": river(i), "pit": improve(river(i), i)}
        lines.append({"prompt": [{"role": "user", "content": str(i)}], "answers": answers})
    return lines


def add_indeed(text, i):
    """PIT has learned to write "indeed", even twice, into 60 of 100 answers."""
    return text.replace(" is ", " is indeed, indeed ") if i < 60 else text


PAIRS = [Pair([], f"Indeed, it is {i}.", f"It is {i}.") for i in range(30)]
PAIRS += [Pair([], f"The answer is {i}.", f"No idea, {i}.") for i in range(70)]


def test_the_word_that_pit_adds_comes_first_and_takes_delta_with_it():
    found = words.measure(lines_of(add_indeed), PAIRS, Judge(loves_indeed))
    row = found["rows"][0]
    assert row["feature"] == "indeed"
    assert row["texts"] == {"pit": 60, "original": 0, "y_w": 30, "y_l": 0}
    assert found["delta"]["delta"] == 0.6
    assert row["without"]["delta"] == 0
    assert (found["answers"], found["pairs"]) == (100, 100)


def test_an_apostrophe_is_one_however_it_is_typed():
    assert words.words_of("I’d say I'd.") == {"i'd", "say"}
    assert words.without("i'd", "Well, I’d say I'd go.") == "Well, say go."


def test_a_word_that_the_judge_does_not_care_for_takes_nothing_with_it():
    lines = lines_of(lambda text, i: add_indeed(text, i).replace(".", "!"))
    judge = Judge(lambda prompts, texts: [text.endswith("!") for text in texts])
    found = words.measure(lines, PAIRS, judge)
    assert found["rows"][0]["feature"] == "indeed"
    assert found["rows"][0]["without"] == found["delta"]


def test_nothing_stands_out_of_the_same_texts():
    found = words.measure(lines_of(lambda text, i: text), PAIRS, Judge(loves_indeed))
    assert found["rows"] == []


def test_answers_without_a_word_do_no_harm():
    for lines in (lines_of(lambda text, i: ""), lines_of(lambda text, i: "...")):
        assert words.measure(lines, PAIRS, Judge(loves_indeed))["delta"]["delta"] == 0
    for line in lines:
        line["answers"]["original"] = ""
    smileys = [Pair([], ":-)", ":-(")] * 8
    assert words.measure(lines, smileys, Judge(loves_indeed))["answers"] == 100


def test_endings_and_lengths_stand_out_too():
    lines = lines_of(lambda text, i: text[:-1] + " and very long for a river of any kind!")
    found = words.measure(lines, PAIRS, Judge(loves_indeed))
    features = [row["feature"] for row in found["rows"]]
    assert {"ends with !", "10 to 19 words"} < set(features)
    assert words.shape_of("Yes.") == ["ends with .", "0 to 9 words"]
    assert words.shape_of("Well...")[0] == "ends with ..."
    assert words.shape_of("So.\n\n*\n")[0] == "ends with *"


def test_log_odds_against_a_plain_second_computation():
    rng = np.random.default_rng(0)
    names = "abcdef"
    a, b, others = (dict(zip(names, rng.integers(1, 50, 6).tolist())) for _ in range(3))
    background = {w: a[w] + b[w] + others[w] for w in names}
    z = words.log_odds(Counter(a), Counter(b), Counter(background))
    for w in names:
        # Monroe et al. (2008), with a prior that weighs as much as one group
        alpha_0 = (sum(a.values()) + sum(b.values())) / 2
        alpha_w = alpha_0 * background[w] / sum(background.values())
        omega = []
        for group in (a, b):
            n = sum(group.values())
            omega.append((group[w] + alpha_w) / (n + alpha_0 - group[w] - alpha_w))
        variance = 1 / (a[w] + alpha_w) + 1 / (b[w] + alpha_w)
        assert z[w] == pytest.approx((math.log(omega[0]) - math.log(omega[1])) / variance**0.5)


def test_the_same_shares_have_a_z_of_0_and_chance_rarely_exceeds_2():
    a = Counter(x=30, y=70)
    rng = np.random.default_rng(0)
    assert words.log_odds(a, Counter(x=60, y=140), a) == pytest.approx({"x": 0, "y": 0})
    high = 0
    for _ in range(500):
        first, second = (Counter(dict(zip("xy", rng.multinomial(100, [0.3, 0.7])))) for _ in "ab")
        high += words.log_odds(first, second, first + second)["x"] > words.CLEAR
    assert high / 500 < 0.03


@pytest.mark.parametrize(
    "text, rest",
    [
        ("It is indeed so.", "It is so."),
        ("Indeed, it is. INDEED!", "it is.!"),
        ("Indeedy is a site, indeed's too.", "Indeedy is a site, indeed's too."),
        ("It is so, indeed", "It is so,"),
        (", there is no such word, ", ", there is no such word, "),
        ("He said 'indeed' twice.", "He said '' twice."),
        ("Title: so\nIndeed it is so.", "Title: so\n it is so."),
    ],
)
def test_only_the_whole_word_is_deleted(text, rest):
    assert words.without("indeed", text) == rest


def test_the_prior_knows_the_annotators_words():
    sides = {"pit": ["a b"] * 40, "original": ["b"] * 40, "y_w": ["c"] * 20, "y_l": ["c"] * 20}
    z = words.log_odds(Counter(a=40, b=40), Counter(b=40), Counter(a=40, b=80, c=40))
    assert words.standing_out(words.words_of, sides)[0]["z"] == pytest.approx(z["a"])


def test_delta_has_the_judges_margin():
    judge = Judge(lambda prompts, texts: [0.05 * ("indeed" in text) for text in texts])
    assert words.measure(lines_of(add_indeed), PAIRS, judge)["delta"]["delta"] == 0
