"""The synthetic task, pairs from files and hubs, cuts, splits."""

import csv
import gzip
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
import files
import task
from errors import UserError

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
        (
            "Now Ann north: west south north. Ben north: north west north. Tom east: east.",
            4,
        ),  # Tom was not asked about
        ("Now Ann north: west south north. Ben north: north west north. And so on.", 4),
        ("Ann north: west south north. Ben north: north west north.", 4),
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
    assert all(
        task.quality(p.prompt[0]["content"], p.chosen)
        > task.quality(p.prompt[0]["content"], p.rejected)
        for p in pairs
    )
    assert pairs == data.synthetic_pairs(100, seed=3) != data.synthetic_pairs(100, seed=4)


def test_split_keeps_a_prompt_on_one_side_and_does_not_depend_on_the_order():
    pairs = data.synthetic_pairs(200, seed=0) + data.synthetic_pairs(40, seed=0)
    parts = data.split(pairs, seed=0)
    prompts = {name: {p.prompt[0]["content"] for p in part} for name, part in parts.items()}
    assert sum(map(len, parts.values())) == 240 and sum(map(len, prompts.values())) == 200
    assert abs(len(prompts["sft"]) - len(prompts["rl"])) <= 1 and abs(len(prompts["rm"]) - 50) <= 1
    again = data.split(pairs[::-1], seed=0)
    assert {name: {p.prompt[0]["content"] for p in part} for name, part in again.items()} == prompts


TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "hey"},
]
TEXT = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: hey\n\nAssistant:"


def read_pair(row):
    columns, pair = files.read_row(row)
    return columns, data.Pair(*pair)


def turn(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"prompt": TEXT, "chosen": " a", "rejected": " b"}, "prompt, chosen, rejected"),
        ({"prompt": TURNS, "chosen": "a ", "rejected": "b"}, "prompt, chosen, rejected"),
        ({"prompt": TURNS, "chosen": turn("a"), "rejected": turn("b")}, "prompt, chosen, rejected"),
        (
            {"prompt": TURNS, "chosen": TURNS + turn("a"), "rejected": TURNS + turn("b")},
            "prompt, chosen, rejected",
        ),
        ({"chosen": TURNS + turn("a"), "rejected": TURNS + turn("b")}, "chosen, rejected"),
        ({"chosen": TEXT + " a", "rejected": TEXT + " b"}, "chosen, rejected"),  # Anthropic/hh-rlhf
        (
            {"instruction": TURNS, "input": "", "chosen": "a", "rejected": "b"},
            "instruction, chosen, rejected",
        ),
        (
            {"question": TURNS, "response_0": "a", "response_1": "b", "label": 0},
            "question, response_0, response_1, label",
        ),
        ({"question": TEXT, "response_0": "b", "response_1": "a", "label": "1"}, None),
        (
            {
                "prompt": TEXT,
                "response_0": "b",
                "response_1": "a",
                "better_response_id": 1,
                "chosen": None,
            },
            None,
        ),
    ],
)
def test_every_form_gives_the_same_pair(row, columns):
    found, pair = read_pair(row)
    assert pair == data.Pair(TURNS, "a", "b") and columns in (None, found)


def test_an_input_follows_its_instruction_and_a_system_message_stays():
    row = {"instruction": "Sort this.", "input": "b a", "chosen": "a b", "rejected": "b a"}
    assert read_pair(row)[1].prompt == [{"role": "user", "content": "Sort this.\n\nb a"}]
    system = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert read_pair({"prompt": system, "chosen": "a", "rejected": "b"})[1].prompt == system


@pytest.mark.parametrize("whole", [TURNS, [{"role": "system", "content": "s"}, *TURNS]])
def test_a_prompt_may_be_all_of_the_conversation_its_beginning_or_its_end(whole):
    for prompt in (whole, whole[-1:], whole[-1]["content"], whole[: len(whole) - 2]):
        row = {"prompt": prompt, "chosen": [*whole, *turn("a")], "rejected": [*whole, *turn("b")]}
        assert read_pair(row)[1] == data.Pair(whole, "a", "b")
    with pytest.raises(
        files.BadRow, match="turns of user"
    ):  # two conversations, one after the other
        read_pair(
            {
                "prompt": "x",
                "chosen": "Human: y\n\nAssistant: a",
                "rejected": "Human: y\n\nAssistant: b",
            }
        )


def test_text_about_transcripts_is_not_one():
    assert files.dialogue("What does\n\nHuman: mean?") == [
        {"role": "user", "content": "What does\n\nHuman: mean?"}
    ]


def test_every_kind_of_file_gives_the_same_pairs(tmp_path):
    rows = [
        {"prompt": f"Say {i},\n\u00fcber", "chosen": f"a{i}", "rejected": "b"} for i in range(5)
    ]
    lines = "\n\n".join(map(json.dumps, rows))
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    (tmp_path / "lines.json").write_text(lines)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with open(tmp_path / "p.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    expected = [read_pair(row)[1] for row in rows]
    for path in tmp_path.iterdir():
        pairs, notes = data.load_pairs(str(path), 10, 0)
        assert (path.name, pairs) == (path.name, expected)
        assert data.describe(notes) == "5 rows of prompt, chosen, rejected"


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path):
    good = {"prompt": "x", "chosen": "y", "rejected": "z"}
    rows = [good, good, good | {"chosen": "z "}, good | {"chosen": " \n"}, good | {"prompt": " "}]
    rows += [{"chosen": TEXT + " a", "rejected": "\n\nHuman: other\n\nAssistant: b"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, notes = data.load_pairs(str(tmp_path / "p.jsonl"), 10, 0)
    assert len(pairs) == 1
    for reason in (
        "seen before",
        "equal answers",
        "an empty answer",
        "an empty prompt",
        "transcripts that part too early",
    ):
        assert notes[f"dropped ({reason})"] == 1, notes
    (tmp_path / "p.jsonl").write_text(json.dumps(good | {"chosen": "z"}))
    with pytest.raises(UserError, match="no pair to learn from: .*1 dropped .equal answers"):
        data.load_pairs(str(tmp_path / "p.jsonl"), 10, 0)


def test_pairs_beyond_the_limit_are_drawn_not_cut_off(tmp_path):
    rows = [{"prompt": f"x{i}", "chosen": "y", "rejected": "z"} for i in range(50)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs, notes = data.load_pairs(str(tmp_path / "p.jsonl"), 20, 0)
    assert len(pairs) == 20 and notes["left out (more than --pairs)"] == 30
    assert pairs == data.load_pairs(str(tmp_path / "p.jsonl"), 20, 0)[0]
    assert {int(p.prompt[0]["content"][1:]) for p in pairs} & set(range(40, 50))


GOOD = b'{"prompt": "x", "chosen": "y", "rejected": "z"}'
BAD = {
    b"{": "not JSON",
    b"[]": "not an object",
    b"3": "not an object",
    b"\x00": "not JSON",
    b"\xff\xfe{": "not JSON",
    b'{"prompt": "x", "chosen": "y"}': "no `rejected`",
    b'{"chosen": "y", "rejected": "z"}': "no `prompt`",
    b'{"prompt": [1], "chosen": "a", "rejected": "b"}': "`prompt` must be",
    b'{"text": "hello"}': "no `chosen`",
    b'{"prompt": "x", "chosen": 3, "rejected": "b"}': "`chosen` must be",
    b"[" * 100_000: "not JSON",
    b'{"prompt": "x", "chosen": "\\ud800", "rejected": "b"}': "lone surrogate",
    b'{"prompt": "x", "response_0": "a", "response_1": "b"}': "no `label`",
    b'{"prompt": "x", "response_0": "a", "response_1": "b", "label": 2}': "must be 0 or 1",
    b'{"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"}': "roles",
    b'{"prompt": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}': "turns of user",
    b'{"prompt": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}], "chosen": "a", "rejected": "b"}': "turns of user",
    b'{"prompt": [{"role": "system", "content": "x"}], "chosen": "a", "rejected": "b"}': "turns of user",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_and_can_be_skipped(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=f"p.jsonl, line 2: .*{BAD[line]}"):
        data.load_pairs(str(path), 10, 0)
    pairs, notes = data.load_pairs(str(path), 10, 0, skip_bad=True)
    assert len(pairs) == 1 and notes["dropped (not a pair)"] == 1


value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(categories=None), max_size=8)
    | st.sampled_from(
        [
            "\n\nHuman: a\n\nAssistant: b",
            "\n\nHuman:",
            " ",
            "",
            "x" * 100_000,
            "\ud800",
            "\x00",
            "0",
            TURNS,
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries(
            {}, optional={"role": st.sampled_from(["user", "assistant"]) | inner, "content": inner}
        )
    ),
    max_leaves=6,
)
columns = [
    "prompt",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "question",
    "response_0",
    "response_1",
    "label",
]
row = st.fixed_dictionaries({}, optional=dict.fromkeys(columns, value)) | st.fixed_dictionaries(
    dict.fromkeys(("prompt", "chosen", "rejected"), value)
)
line = (
    row.map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=40)
    | value.map(lambda v: json.dumps(v).encode())
)


@settings(max_examples=400, deadline=None, derandomize=True, database=None)
@given(
    st.lists(line.map(lambda raw: raw.replace(b"\n", b" ")), max_size=4),
    st.sampled_from([".jsonl", ".json", ".csv"]),
)
def test_whatever_a_file_holds_it_is_read_or_named(tmp_path_factory, lines, ending):
    """Never another exception, never a silent drop, and what comes out is always fit for a chat template and a tokenizer."""
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    path.write_bytes(b"\n".join([GOOD, *lines]))
    for skip_bad in (False, True):
        try:
            pairs, notes = data.load_pairs(str(path), 10, 0, skip_bad)
        except UserError as error:
            assert str(path) in str(error)
            continue
        read = sum(number for what, number in notes.items() if what.startswith("rows"))
        assert (
            len(pairs) + sum(number for what, number in notes.items() if what.startswith("dropped"))
            == read
        )
        if ending == ".jsonl":
            assert read == 1 + sum(bool(raw.strip()) for raw in lines)
        for pair in pairs:
            assert (
                pair.chosen != pair.rejected
                and pair.prompt[-1]["role"] == "user"
                and files.is_prompt(pair.prompt)
            )
            texts = [pair.chosen, pair.rejected, *(message["content"] for message in pair.prompt)]
            assert all(text.strip() and text.encode() for text in texts)
            assert all(a["role"] != b["role"] for a, b in zip(pair.prompt, pair.prompt[1:]))


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("p.jsonl.gz", b"no gzip", "cannot be read"),
        ("p.jsonl.gz", gzip.compress(GOOD * 9)[:-9], "cannot be read"),
        ("p.parquet", b"PAR1", "cannot be read"),
        ("p.csv", b"prompt\n\xff\xff", "cannot be read"),
        ("p.txt", b"hello", "ending"),
        ("p.csv", b"prompt,chosen,rejected\nQ,Yes, I can,No\n", "line 2: it has more cells"),
        ("p.json", b"[1", "cannot be read"),
        ("p.jsonl", b"", "it is empty"),
        ("p.csv", b"a,b\n1,2\n", "line 2: there is no"),
    ],
)
def test_damaged_and_unknown_files_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        data.load_pairs(str(tmp_path / name), 10, 0)
    assert name in str(error.value) and len(str(error.value).splitlines()) <= 2


def test_a_hub_id_is_read_through_datasets_and_without_a_network_said(monkeypatch):
    import datasets

    asked = []
    rows = [{"chosen": TEXT + " a", "rejected": TEXT + " b"}]  # as Anthropic/hh-rlhf has them
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: asked.append((name, split)) or rows
    )
    assert (
        data.load_pairs("hh", 10, 0)[0]
        == data.load_pairs("some/set:test", 10, 0)[0]
        == [data.Pair(TURNS, "a", "b")]
    )
    assert asked == [("Anthropic/hh-rlhf", "train"), ("some/set", "test")]
    monkeypatch.undo()
    with pytest.raises(UserError, match="--data no/such: .*the hub does not give it"):
        data.load_pairs("no/such", 10, 0)


def test_long_prompts_lose_their_oldest_turns_then_words_and_never_their_end():
    def count(turns):  # three tokens of template a turn, one a word
        return sum(3 + len(m["content"].split()) for m in turns)

    system, long = {"role": "system", "content": "s"}, {"role": "user", "content": "a b c d e f g"}
    prompt = [system, *TURNS, *turn("yes"), long]
    assert data.shorten(prompt, count, 22) == [system, TURNS[2], *turn("yes"), long]
    assert data.shorten(prompt, count, 15) == [system, long]
    assert data.shorten(prompt, count, 10) == [system, {"role": "user", "content": "e f g"}]
    assert data.shorten(prompt, count, 7) is None


def test_cuts_are_counted_and_pairs_that_became_equal_dropped():
    from collections import Counter

    def words(text):
        return len(text.split())

    pairs = [
        data.Pair([{"role": "user", "content": f"{i} the end"}], "yes", "no") for i in range(3)
    ]
    pairs += [
        data.Pair(TURNS, "much too long", "no"),
        data.Pair([{"role": "user", "content": "xyz"}], "yes", "no"),
    ]
    notes = Counter()
    kept = data.filter_by_length(
        pairs, lambda turns: sum(words(m["content"]) for m in turns), words, 2, 2, notes
    )
    assert [p.prompt[0]["content"] for p in kept] == ["the end", "xyz"]
    assert notes["prompts cut to 2 tokens"] == 1 and notes["dropped (seen before, once cut)"] == 2
    assert notes["dropped (an answer over 2 tokens)"] == 1


@pytest.mark.parametrize("label", [1, 1.0, True, "1", "1.0", "true"])
def test_a_label_may_be_written_as_tables_write_it(label):
    _, pair = read_pair(
        {"question": "x", "response_0": "a", "response_1": "b", "label": label}
    )
    assert (pair.chosen, pair.rejected) == ("b", "a")


def test_messages_in_a_cell_of_a_csv_file(tmp_path):
    said = [
        json.dumps([{"role": role, "content": text}])
        for role, text in (("user", "x"), ("assistant", "a"), ("assistant", "b"))
    ]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], said])
    (pair,), _ = data.load_pairs(str(tmp_path / "pairs.csv"), 10, 0)
    assert pair == data.Pair([{"role": "user", "content": "x"}], "a", "b")
    text = (
        said[1] + " is how a message looks"
    )  # not in a cell of a CSV file, or more than messages: it is the answer itself
    assert read_pair({"prompt": "x", "chosen": said[1], "rejected": "b"})[1].chosen == said[1]
    assert files.read_cell(text) == text


def test_too_few_pairs_and_a_missing_file_are_said():
    with pytest.raises(UserError, match="too few"):
        data.split(data.synthetic_pairs(20, seed=0), seed=0)
    with pytest.raises(UserError, match="no such file"):
        data.load_pairs("nowhere.jsonl", 10, 0)
