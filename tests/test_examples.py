"""The example of your own task: its rule by hand, and its pairs from a stub writer."""

import importlib.util
import itertools
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from examples import drafts

PATH = Path(__file__).parent.parent / "examples" / "instructions.py"
spec = importlib.util.spec_from_file_location("instructions", PATH)
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)

WORDS = "Use the words tea and coat."
TITLE = 'Begin with "Title:" and your last word.'
GOOD = "My tea is hot. I like my coat!"


@pytest.mark.parametrize(
    "requirement, meets, fails",
    [
        ("", GOOD, "My team has coats and more."),
        ("Avoid the word the.", GOOD, "The tea is hot, and I like my coat."),
        ("Begin with the word Look.", "look, my tea and my coat.", GOOD),
        (TITLE, "Title: coat\nThe tea stained my coat!", "Title: tea\nThe tea stained my coat!"),
        (TITLE, "Title: coat\nThe tea stained my coat!", "Title: coat. The tea stained my coat!"),
        ("End with an exclamation mark.", GOOD, "My tea and my coat!."),
        ("End with three dots.", "My tea is on my coat...", "My tea is on my coat.."),
        ("Write exactly 1 sentence.", "My tea wets my coat.", GOOD),
        ("Write exactly 2 sentences.", GOOD, "My tea is hot. I like my coat! And then"),
        ("Write exactly 3 sentences.", GOOD + " So it is.", GOOD),
        ("Use at most 8 words.", GOOD, GOOD + " Yes."),
        ("Use at least 8 words.", GOOD, "My tea wets my coat."),
    ],
)
def test_rule_by_hand(requirement, meets, fails):
    prompt = f"Write about a rainy day. {WORDS} {requirement}"
    assert example.quality(prompt, meets) == 1
    assert example.quality(prompt, fails) < 1


def test_rule_counts_requirements():
    prompt = f"Write about a rainy day. {WORDS} Avoid the word was. End with three dots."
    assert example.quality(prompt, GOOD) == 0.75
    assert example.quality(prompt, "My tea was hot, and it was late.") == 0.25
    assert example.quality(prompt, "") == example.quality(prompt, "tea coat") == 0


def test_every_requirement_is_read():
    """Each prompt states five requirements, and together they are of all kinds."""
    rng = random.Random(0)
    kinds = set()
    for _ in range(300):
        prompt, _ = example.draw_prompt(rng)
        stated = [wording for wording in example.REQUIREMENTS if example.re.search(wording, prompt)]
        assert len(stated) == 5, prompt
        kinds |= set(stated)
    assert kinds == set(example.REQUIREMENTS)
    assert len(example.TOPICS) >= 60


@pytest.fixture
def pools(tmp_path):
    """What a stub writes about each topic: a sentence for each word, and what does not fit."""
    path = tmp_path / "sentences.jsonl"
    with open(path, "w") as file:
        for topic, words in example.TOPICS.items():
            for word in words.split():
                for text in (
                    f"I see one {word}.",
                    f"The {word} was here!",
                    f"A {word} that is cut off",
                ):
                    print(example.json.dumps([topic, text]), file=file)
            print(example.json.dumps([topic, f"We all like that {word}."]), file=file)
    return example.fluent_sentences(path)


def test_sentences_end_in_different_words(pools):
    for topic, words in example.TOPICS.items():
        assert pools[topic] == [f"I see one {word}." for word in words.split() if len(word) > 3]


def test_pairs_of_a_stub_writer(pools):
    rows, fresh = example.draw_rows(pools, pairs=60, prompts=40, rng=random.Random(0))
    for row in rows:
        better, worse = (example.quality(row["prompt"], row[y]) for y in ("chosen", "rejected"))
        assert better > worse
    prompts = {row["prompt"] for row in rows}
    assert len(prompts) == 60 and len(fresh) == 40
    assert prompts.isdisjoint(row["prompt"] for row in fresh)
    # the longer text wins in half of the pairs
    lengths = [[len(row[side].split()) for row in rows] for side in ("chosen", "rejected")]
    longer = sum((a > b) + (a == b) / 2 for a, b in zip(*lengths))
    assert 0.35 < longer / 60 < 0.65
    assert example.draw_rows(pools, pairs=60, prompts=40, rng=random.Random(0)) == (rows, fresh)


def test_a_wrong_title_is_another_word_of_the_text():
    sentences = ["The street is wet.", "Rain fell on the street."]
    titles = []
    for opening in drafts.TITLES[:5]:
        draft = {"sentences": sentences, "opening": opening, "mark": "!"}
        first, text = drafts.tell(draft).split("\n")
        assert text == "The street is wet. Rain fell on the street!"
        titles.append(first)
    # the last word; then the last word of the other sentence, the other long words, and again
    assert titles == [f"Title: {word}" for word in ("street", "wet", "rain", "fell", "wet")]


def test_too_few_sentences_are_told_by_topic(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "write_sentences", lambda model, path: path.write_text(""))
    with pytest.raises(example.typer.BadParameter, match="about a rainy day"):
        example.main("stub", tmp_path)


def test_a_title_alone_says_nothing(pools):
    """Many a worse answer has a title, too: another word than its last."""
    rows, _ = example.draw_rows(pools, pairs=200, prompts=0, rng=random.Random(0))
    titled = [row for row in rows if "Title" in row["prompt"]]
    wrong = 0
    for row in titled:
        words = drafts.words_of(row["rejected"])
        wrong += words[0] == "title" and words[1] != words[-1]
    assert wrong / len(titled) > 0.2


def test_most_pairs_differ_in_one_part(pools):
    """What PIT changes is mostly one word: the reward models must have seen such pairs."""
    rows, _ = example.draw_rows(pools, pairs=200, prompts=0, rng=random.Random(0))
    kinds = dict.fromkeys(("title", "mark", "sentence"), 0)
    for row in rows:
        better, worse = (row[y].split("\n") for y in ("chosen", "rejected"))
        titles = [text[0] for text in (better, worse) if len(text) == 2]
        if better[-1] == worse[-1]:
            kinds["title"] += len(titles) == 2
        elif titles in ([], titles[:1] * 2):
            same_but_mark = better[-1].rstrip(".!") == worse[-1].rstrip(".!")
            kinds["mark" if same_but_mark else "sentence"] += 1
    assert min(kinds.values()) > 0.08 * len(rows), kinds


def test_marks_differ_where_any_will_do(pools, monkeypatch):
    """Or a reward model takes what it never saw differ for what matters."""
    monkeypatch.setattr(example, "revise", lambda draft, *_: draft)  # no flaws
    rng = random.Random(0)
    others = 0
    for topic, pool in [*pools.items()] * 3:
        prompt = f"Write about {topic}. {WORDS} End with three dots."
        for free in (False, True):
            x = prompt.partition(" End")[0] if free else prompt
            better, worse = example.draw_pair(x, pool, rng)
            assert example.quality(x, better) >= example.quality(x, worse)
            # where a sentence comes twice, it is added at the end, and no word is moved
            words, more = map(drafts.words_of, (better, worse))
            twice = "Title" not in better and len(more) > len(words)
            assert not twice or more[: len(words)] == words
            better, worse = (re.search(r"\W*$", text)[0] for text in (better, worse))
            others += free and better != worse
    assert others > len(pools)


def test_what_no_reader_would_prefer_loses(pools):
    rows, _ = example.draw_rows(pools, pairs=400, prompts=0, rng=random.Random(0))
    twice = {"chosen": 0, "rejected": 0}
    for row, side in itertools.product(rows, twice):
        sentences = re.findall(r"[^.!\n]+", row[side].lower())
        twice[side] += len(sentences) > len({sentence.strip() for sentence in sentences})
    assert twice["chosen"] == 0 < twice["rejected"] / len(rows) < 0.1


def test_changes_keep_one_to_three_different_sentences(pools):
    rng = random.Random(0)
    pool = max(pools.values(), key=len)
    draft = {"sentences": pool[:1], "opening": "", "mark": "."}
    counts = set()
    for _ in range(300):
        draft = drafts.change(draft, pool, rng)
        assert len(set(draft["sentences"])) == len(draft["sentences"])
        counts.add(len(draft["sentences"]))
    assert counts == {1, 2, 3}


def test_a_flaw_costs_requirements(pools):
    """`revise` also makes a draft worse, in as many steps as it may take."""
    prompt = f"{WORDS} {TITLE} End with three dots. Use at least 8 words."

    def bad(text):
        return -example.quality(prompt, text)

    rng = random.Random(0)
    for pool in [*pools.values()][:20]:
        draft = {"sentences": pool[:2], "opening": "last word", "mark": "..."}
        worse = drafts.revise(draft, bad, pool, 1, rng)
        assert bad(drafts.tell(worse)) > bad(drafts.tell(draft))
        changed = sum(draft[part] != worse[part] for part in draft)
        assert changed == 1
        assert drafts.revise(draft, bad, pool, 0, rng) == draft


def test_garbling_keeps_the_words():
    text = "My tea is hot, and I like my coat."
    garbled = {drafts.garble(text, random.Random(seed)) for seed in range(9)}
    assert {tuple(sorted(words.split())) for words in garbled} == {tuple(sorted(text.split()))}
    assert len(garbled) > 5


def test_sentences_keep_their_topics_in_every_batch(tmp_path, monkeypatch):
    def generate(role, prompts, *_, **__):
        return SimpleNamespace(responses=["t"] * len(prompts))

    stub = SimpleNamespace(encode_prompt=str, decode=lambda texts: texts, generate=generate)
    monkeypatch.setattr(example, "load_model", lambda *_, **__: stub)
    monkeypatch.setattr(example, "TOPICS", {"a": "x", "b": "y"})
    path = tmp_path / "sentences.jsonl"
    example.write_sentences("stub", path, batch=8)
    topics = [json.loads(line)[0] for line in path.read_text().splitlines()]
    assert topics == ["a"] * 8 + ["b"] * 8
    # killed while it wrote a line, the last one of a batch or another: the same lines in the end
    whole = path.read_text()
    for end in (len(whole) // 2 + 3, len(whole) - 3):
        path.write_text(whole[:end])
        example.write_sentences("stub", path, batch=8)
        assert path.read_text() == whole
