"""The synthetic task, files of pairs, splits."""

import gzip
import json
import random

import pytest

import data
from run import UserError

PROMPT = "Where does each look in the end? Ann north: left left back. Ben west: right left right."


@pytest.mark.parametrize(
    "answer, met",
    [
        ("Now Ann north: west south north. Ben north: north west north.", 5),
        ("Now Ben north: north west north. Ann north: west south north.", 5),  # in any order
        ("Now Ann east: west south north. Ben north: north west north.", 4),  # a wrong end
        ("Now Ann north: west south east. Ben north: north west north.", 4),  # a wrong way
        ("Now Ann north: west south. Ben north: north west north.", 4),  # a way too short
        ("Now Ann north: west south north.", 3),  # Ben is missing
        ("Now Ann north: west south north. Ben north: north west north. Tom east: east.", 4),  # Tom was not asked about
        ("Now Ann north: west south north. Ben north: north west north. And so on.", 4),
        ("Ann north: west south north. Ben north: north west north.", 4),
        ("", 0),
        ("?!", 0),
    ],
)
def test_quality_counts_the_requirements_met(answer, met):
    assert data.quality(PROMPT, answer) == met / 5


def test_a_perfect_answer_exists_for_every_prompt_and_flaws_lower_it():
    rng = random.Random(0)
    means = dict.fromkeys((0, 2, 6), 0.0)
    for _ in range(200):
        people = data.draw_people(rng)
        prompt = data.ask(people)
        assert data.asked_about(prompt) == people
        for flaws in means:
            lines = data.spoil(data.solve(people), flaws, rng)
            assert data.read(data.tell(lines)) == lines
            means[flaws] += data.quality(prompt, data.tell(lines)) / 200
    assert means[0] == pytest.approx(1) and means[0] > means[2] + 0.1 > means[6] + 0.2


def test_pairs_are_ordered_by_quality_and_repeatable():
    pairs = data.synthetic_pairs(100, seed=3)
    assert all(data.quality(p.prompt[0]["content"], p.chosen) > data.quality(p.prompt[0]["content"], p.rejected) for p in pairs)
    assert pairs == data.synthetic_pairs(100, seed=3) != data.synthetic_pairs(100, seed=4)


def test_split_keeps_a_prompt_on_one_side_and_does_not_depend_on_the_order():
    pairs = data.synthetic_pairs(200, seed=0) + data.synthetic_pairs(40, seed=0)
    parts = data.split(pairs, seed=0)
    prompts = {name: {p.prompt[0]["content"] for p in part} for name, part in parts.items()}
    assert sum(map(len, parts.values())) == 240 and sum(map(len, prompts.values())) == 200
    assert abs(len(prompts["sft"]) - len(prompts["rl"])) <= 1 and abs(len(prompts["rm"]) - 50) <= 1
    again = data.split(pairs[::-1], seed=0)
    assert {name: {p.prompt[0]["content"] for p in part} for name, part in again.items()} == prompts


def test_files_plain_and_gzipped_text_and_messages(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "hey"}]
    as_text = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: hey\n\nAssistant:"
    rows = [{"prompt": prompt, "chosen": " a", "rejected": " b"} for prompt in (messages, as_text, "hi")]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / "p.jsonl").write_text(text)
    with gzip.open(tmp_path / "p.jsonl.gz", "wt") as file:
        file.write(text)
    plain = data.load_pairs(str(tmp_path / "p.jsonl"), 10, 0)
    assert plain == data.load_pairs(str(tmp_path / "p.jsonl.gz"), 10, 0)
    assert [p.prompt for p in plain] == [messages, messages, messages[:1]]
    assert (plain[0].chosen, plain[0].rejected) == ("a", "b")


@pytest.mark.parametrize(
    "line", ["{", "[]", "3", '{"prompt": "x", "chosen": "y"}', '{"prompt": [1], "chosen": "a", "rejected": "b"}', "\x00"]
)
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x", "chosen": "y", "rejected": "z"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2"):
        data.load_pairs(str(path), 10, 0)


def test_too_few_pairs_and_a_missing_file_are_said():
    with pytest.raises(UserError, match="too few"):
        data.split(data.synthetic_pairs(20, seed=0), seed=0)
    with pytest.raises(UserError, match="no such file"):
        data.load_pairs("nowhere.jsonl", 10, 0)
