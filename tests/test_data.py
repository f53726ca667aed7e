"""The built-in task, what is read and dropped, the length filter, the split."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import data
import task
from errors import UserError

PROMPT = "Where does each look in the end? Ann north: left left back. Ben west: right left right."
ANN = "Ann north: west south north."
BEN = "Ben north: north west north."


@pytest.mark.parametrize(
    "answer, met",
    [
        (f"Now {ANN} {BEN}", 5),
        (f"Now {BEN} {ANN}", 5),  # in any order
        (f"Now Ann east: west south north. {BEN}", 4),  # a wrong end
        (f"Now Ann north: west south east. {BEN}", 4),  # a wrong way
        (f"Now Ann north: west south. {BEN}", 4),  # a way too short
        (f"Now {ANN}", 3),  # Ben is missing
        (f"Now {ANN} {BEN} Tom east: east.", 4),  # nobody asked about Tom
        (f"Now {ANN} {BEN} And so on.", 4),
        (f"{ANN} {BEN}", 4),
        ("", 0),
        ("?!", 0),
    ],
)
def test_quality_counts_the_requirements_met(answer, met):
    assert task.quality(PROMPT, answer) == met / 5


def test_a_perfect_answer_exists_for_every_prompt_and_flaws_lower_it():
    rng = random.Random(0)
    means = dict.fromkeys((0, 2, 6), 0.0)
    for _ in range(200):
        people = task.draw_people(rng)
        prompt = task.ask(people)
        assert task.read(prompt) == people
        for flaws in means:
            lines = task.spoil(task.solve(people), flaws, rng)
            assert task.read(task.tell(lines)) == lines
            means[flaws] += task.quality(prompt, task.tell(lines)) / 200
    assert means[0] == pytest.approx(1) and means[0] > means[2] + 0.1 > means[6] + 0.2


def test_pairs_are_ordered_by_quality_and_repeatable():
    pairs = data.synthetic_pairs(100, seed=3)
    for pair in pairs:
        prompt = pair.prompt[0]["content"]
        assert task.quality(prompt, pair.chosen) > task.quality(prompt, pair.rejected)
    assert pairs == data.synthetic_pairs(100, seed=3) != data.synthetic_pairs(100, seed=4)


def test_the_pairs_of_the_built_in_run_are_the_ones_that_its_numbers_come_from():
    pairs = data.synthetic_pairs(12_000, seed=0)
    assert data.fingerprint(pairs).startswith("f7767c0cdd9f42db")
    assert data.fingerprint([*pairs[:-1], pairs[0]]) != data.fingerprint(pairs)


# Reading


def user(text):
    return [{"role": "user", "content": text}]


def test_pairs_beyond_the_limit_are_drawn_not_cut_off(tmp_path, capsys):
    rows = [{"prompt": f"x{i}", "chosen": "y", "rejected": "z"} for i in range(50)]
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    pairs = data.load_pairs(str(path), 20, 0)
    counts = "50 read as prompt, chosen, rejected (TRL), 30 left out (more than --pairs)"
    assert capsys.readouterr().out == f"{path}: {counts}\n"
    assert len(pairs) == 20 and pairs == data.load_pairs(str(path), 20, 0)
    assert {int(pair.prompt[0]["content"][1:]) for pair in pairs} & set(range(40, 50))
    assert pairs != data.load_pairs(str(path), 20, 1)


def test_an_empty_file_has_no_pair_to_learn_from(tmp_path):
    (tmp_path / "p.jsonl").touch()
    with pytest.raises(UserError, match="no pair to learn from"):
        data.load_pairs(str(tmp_path / "p.jsonl"), 10, 0)


# Lengths: a stand-in model counts words, and three tokens of template for each turn

LM = SimpleNamespace(
    encode_response=str.split,
    encode_prompt=lambda turns: sum((["<"] * 3 + turn["content"].split() for turn in turns), []),
)


def limits(prompt, response, rounds="annotated,policy"):
    return SimpleNamespace(
        max_prompt=prompt, max_response=response, rounds=rounds, data="pairs.jsonl", seed=0
    )


def test_long_prompts_lose_their_oldest_turns_then_words_and_never_their_end():
    system = {"role": "system", "content": "s"}
    yes = {"role": "assistant", "content": "yes"}
    first = (*user("hi"), yes)
    middle = (*user("hey"), yes)
    last = user("a b c d e f g")
    prompt = [system, *first, *middle, *last]

    def cut(longest):
        return data.shorten(prompt, LM, longest)

    assert cut(30) == prompt
    assert cut(22) == [system, *middle, *last]
    assert cut(15) == [system, *last]
    assert cut(10) == [system, *user("e f g")]
    assert cut(7) is None


def test_cuts_are_counted(capsys):
    pairs = [data.Pair(user(f"{i} the end"), "yes", "no") for i in range(3)]
    pairs += [
        data.Pair(user("long"), "much too long", "no"),
        data.Pair(user("xyz"), "yes", "no", given="however long"),
        data.Pair([{"role": "system", "content": "so many words"}, *user("xyz")], "yes", "no"),
    ]
    kept, beginnings = data.filter_by_length(pairs, LM, limits(5, 2))
    assert kept == [data.Pair(user("the end"), "yes", "no")] * 3 + [pairs[4]]
    assert beginnings == [pair.prompt for pair in (*pairs[:3], pairs[4])]  # not cut
    assert capsys.readouterr().out == (
        "pairs.jsonl: 1 dropped (an answer over 2 tokens), 3 with a prompt cut to 5 tokens, "
        "1 dropped (a prompt that cannot be cut to 5 tokens), 4 kept\n"
    )


def test_a_given_answer_must_fit_where_a_round_improves_it():
    pairs = [data.Pair(user("x"), "yes", "no", given=text) for text in ("one", "one two three")]
    kept, _ = data.filter_by_length(pairs, LM, limits(5, 2, "annotated,given"))
    assert kept == pairs[:1]
    assert data.filter_by_length(pairs, LM, limits(5, 2))[0] == pairs


def test_where_most_answers_are_too_long_the_limit_that_would_do_is_told(capsys):
    pairs = [data.Pair(user(str(i)), "word " * (i + 1), "no") for i in range(100)]
    assert len(data.filter_by_length(pairs, LM, limits(9, 40))[0]) == 40
    assert "--max-response 91 would keep 90%" in capsys.readouterr().out
    assert len(data.filter_by_length(pairs, LM, limits(9, 91))[0]) == 91
    assert "would keep" not in capsys.readouterr().out


# The split


def prompts_of(parts):
    return {name: {pair.prompt[0]["content"] for pair in part} for name, part in parts.items()}


def test_split_keeps_a_prompt_on_one_side_and_does_not_depend_on_the_order():
    pairs = data.synthetic_pairs(200, seed=0)
    pairs += [data.Pair(pair.prompt, "another answer", pair.rejected) for pair in pairs[:40]]
    parts = data.split(pairs, [pair.prompt for pair in pairs], seed=0)
    prompts = prompts_of(parts)
    assert sum(map(len, prompts.values())) == 200
    assert len(set.union(*prompts.values())) == 200
    assert abs(len(prompts["sft"]) - len(prompts["rl"])) <= 1 and abs(len(prompts["rm"]) - 50) <= 1
    turned = pairs[::-1]
    assert prompts_of(data.split(turned, [pair.prompt for pair in turned], seed=0)) == prompts
    assert prompts_of(data.split(pairs, [pair.prompt for pair in pairs], seed=1)) != prompts


def test_dialogues_that_begin_alike_are_in_one_part_even_if_cut():
    """Half of these go on with the answer that was chosen in the other half."""
    pairs = []
    for i in range(100):
        first = user(f"question {i}")
        then = [*first, {"role": "assistant", "content": f"answer {i}"}, *user("go on, please")]
        pairs += [data.Pair(first, f"answer {i}", "no"), data.Pair(then, f"more {i}", "no")]
    parts = data.load_parts(limits(6, 9), LM, pairs)
    parts = {name: {pair.chosen.split()[-1] for pair in part} for name, part in parts.items()}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 100


def test_only_the_held_out_part_has_one_pair_of_each_dialogue():
    pairs = [data.Pair(user(f"{i}"), f"{i}", "no") for i in range(300)]
    beginnings = [user(f"{i % 100}") for i in range(300)]  # three pairs each
    parts = data.split(pairs, beginnings, seed=0)
    assert [len(part) for part in parts.values()] == [10, 45, 75, 75, 75]
    assert len({int(pair.chosen) % 100 for pair in parts["held_out"]}) == 10


def test_too_few_pairs_are_told_on_a_line_of_their_own(capsys):
    pairs = data.synthetic_pairs(34, seed=0)
    with pytest.raises(UserError, match="^Too few pairs: 34, dialogues: 34.*\n.* --max-resp"):
        data.load_parts(limits(99, 99), LM, pairs)
    assert capsys.readouterr().out == "pairs.jsonl: 34 kept\n"


def test_many_pairs_of_a_few_prompts_are_too_few():
    pairs = [data.Pair(user(f"{i % 40}"), f"{i}", "no") for i in range(4000)]
    with pytest.raises(UserError, match="^Too few pairs: 4000, dialogues: 40.* held_out .* 4 of"):
        data.split(pairs, [pair.prompt for pair in pairs], seed=0)


@pytest.mark.parametrize("module", ["data", "votes", "report"])
def test_what_needs_no_model_is_imported_without_torch_and_datasets(module):
    code = f"import {module}, sys; sys.exit(bool({{'torch', 'datasets'}} & sys.modules.keys()))"
    root = Path(data.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


def test_the_longest_sequence_has_two_answers():
    cfg = SimpleNamespace(max_prompt=100, max_response=10)
    assert data.max_length(cfg) == 100 + 10 + 10 + data.IMPROVE_TOKENS
