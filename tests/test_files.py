"""Forms of preference pairs, kinds of files, folders and hubs; what is said about bad ones."""

import bz2
import csv
import gzip
import json
import re

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import files
from data import Pair, in_words, load_pairs, read_pairs
from errors import UserError

TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "ho"},
    {"role": "user", "content": "hey"},
]
TEXT = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: hey\n\nAssistant:"
SHAREGPT = [
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "ho"},
    {"from": "human", "value": "hey"},
]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, *TURNS[1:]]
SYSTEM = {"role": "system", "content": "Be brief."}


def said(text):
    return {"role": "assistant", "content": text}


def read(row):
    """A row -> its form's name, its pair."""
    form = files.find_form(row, files.FORMS)
    return form.name, Pair(*files.read_pair(row, form))


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


# Forms


def put(row, path, value):
    """Write a value to where `files.find` looks for it."""
    *way, last = path.split(".")
    for key in way:
        row = row.setdefault(key, {})
    row[last] = value


@pytest.mark.parametrize("form", [f for f in files.FORMS if f.rejected != "-"], ids=str)
def test_every_line_of_the_table_gives_the_same_pair(form):
    row = {}
    if form.prompt != "-":
        put(row, form.prompt.split("+")[0], TURNS)
    before = TEXT if form.prompt == "-" else ""
    put(row, form.chosen, before + "a")
    put(row, form.rejected, before + "b")
    if form.label:
        put(row, form.label, float(form.low))
    assert read(row) == (form.name, Pair(TURNS, "a", "b"))
    if form.label:
        put(row, form.label, float(form.high))
        assert read(row) == (form.name, Pair(TURNS, "b", "a"))


@pytest.mark.parametrize(
    "name, row",
    [
        ("TRL", {"prompt": TEXT, "chosen": " a", "rejected": " b", "score": 1}),
        ("TRL", {"prompt": TURNS, "chosen": [said("a ")], "rejected": [said("b")]}),
        ("TRL", {"prompt": PARTS, "chosen": said("a"), "rejected": said("b")}),
        ("TRL", {"prompt": "hey", "chosen": [*TURNS, said("a")], "rejected": [*TURNS, said("b")]}),
        ("Anthropic", {"chosen": [*TURNS, said("a")], "rejected": [*TURNS, said("b")]}),
        ("Anthropic", {"chosen": TEXT + " a", "rejected": TEXT + " b"}),
        ("Alpaca", {"instruction": TURNS, "input": "", "chosen": "a", "rejected": "b"}),
        ("Alpaca-outputs", {"instruction": TURNS, "input": "", "output": ["a", "b"]}),
        (
            "ShareGPT",
            {
                "conversations": SHAREGPT,
                "chosen": {"from": "gpt", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
        ),
        (
            "OpenAI",
            {
                "input": {"messages": TURNS, "tools": [], "parallel_tool_calls": True},
                "preferred_output": [said("a")],
                "non_preferred_output": [said("b")],
            },
        ),
        (
            "Stanford-SHP",
            {"history": TEXT, "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 9},
        ),
        (
            "WebGPT",
            {
                "question": {"dataset": "eli5", "full_text": TEXT},
                "answer_0": "a",
                "answer_1": "b",
                "score_0": 0.33,
                "score_1": -0.33,
            },
        ),
        (
            "HelpSteer3",
            {"context": TURNS, "response1": "a", "response2": "b", "overall_preference": -2},
        ),
        (
            "Summaries",
            {
                "info": {"id": "t3_1", "title": TEXT, "post": "", "article": None},
                "summaries": [{"text": "b", "policy": "ref"}, {"text": "a", "policy": "sup2"}],
                "choice": 1,
            },
        ),
    ],
)
def test_rows_as_the_public_data_sets_have_them(name, row):
    assert read(row) == (name, Pair(TURNS, "a", "b"))


def test_parts_of_a_prompt_and_a_system_message_stay():
    row = {"instruction": "Sort this.", "input": "b a", "chosen": "a b", "rejected": "b a"}
    assert read(row)[1].prompt == [{"role": "user", "content": "Sort this.\n\nb a"}]
    orca = {"system": "Be brief.", "question": "hey", "chosen": "a", "rejected": "b"}
    assert read(orca) == ("Orca", Pair([SYSTEM, TURNS[2]], "a", "b"))
    assert read(orca | {"system": ""})[1].prompt == TURNS[2:]
    for prompt in ([SYSTEM, *TURNS], [SYSTEM | {"role": "developer"}, *TURNS]):
        assert read({"prompt": prompt, "chosen": "a", "rejected": "b"})[1].prompt[0] == SYSTEM


@pytest.mark.parametrize("whole", [TURNS, [SYSTEM, *TURNS]])
def test_a_prompt_may_be_all_of_the_conversation_its_beginning_or_its_end(whole):
    for prompt in (whole, whole[-1:], whole[-1]["content"], whole[: len(whole) - 2]):
        row = {"prompt": prompt, "chosen": [*whole, said("a")], "rejected": [*whole, said("b")]}
        assert read(row)[1] == Pair(whole, "a", "b")
    human = "Human: y\n\nAssistant: "
    with pytest.raises(
        files.BadRow, match="user and assistant must take turns"
    ):  # two conversations in a row
        read({"prompt": "x", "chosen": human + "a", "rejected": human + "b"})


@pytest.mark.parametrize(
    "text", ["What does\n\nHuman: mean?", "Assistant: that is me", "Human: is a great novel?"]
)
def test_text_about_transcripts_is_not_one(text):
    assert files.read_turns(text, "prompt") == [{"role": "user", "content": text}]


@pytest.mark.parametrize("between", ["\n\n", "\r\n\r\n", "\n", "\r\n"])
def test_a_transcript_may_come_from_windows_or_lack_empty_lines(between):
    text = f"Human: hi{between}Assistant: ho{between}Human: hey{between}Assistant:"
    assert files.read_turns(text, "prompt") == TURNS


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_an_empty_line_parts_turns_where_there_is_one(end):
    text = f"Human: Go on:{end}Human: hi{end}{end}Assistant: ho"
    assert files.read_turns(text, "prompt")[0]["content"] == "Go on:\nHuman: hi"
    text = "\n\nHuman: Go on:\nHuman: hi"
    assert files.read_turns(text, "prompt")[0]["content"] == "Go on:\nHuman: hi"


def test_line_ends_of_windows_are_no_part_of_a_text():
    assert read({"prompt": "x\r\ny", "chosen": "a\r\nb", "rejected": "c"})[1] == Pair(
        [{"role": "user", "content": "x\ny"}], "a\nb", "c"
    )


def test_a_label_may_be_a_word_and_any_other_word_is_a_tie():
    form = files.form_of_columns(
        "prompt=q, chosen=a, rejected=b, label=winner, low=model_a, high=model_b"
    )
    row = {"q": "x", "a": "left", "b": "right"}
    assert files.read_pair(row | {"winner": "Model_A"}, form)[1] == "left"
    assert files.read_pair(row | {"winner": " model_b"}, form)[1] == "right"
    with pytest.raises(files.TeachesNothing, match="no preference: both are bad"):
        files.read_pair(row | {"winner": "Both are bad "}, form)


def test_columns_that_nobody_reads_are_named(tmp_path, capsys):
    row = {"instruction": "x", "input": "y", "chosen": "a", "rejected": "b", "system": "s"}
    parts = {"instruction": "x", "output": ["a", "b"]}  # a form with fields of a column
    rows = [row | {"history": [["p", "q"]], "id": 7, "response": "d"}, row | {"chosen": "c"}, parts]
    read_pairs(write(tmp_path / "p.jsonl", rows))
    assert capsys.readouterr().out.endswith("columns that are not read: history, id\n")
    read_pairs(write(tmp_path / "p.jsonl", rows[1:]))
    assert "not read" not in capsys.readouterr().out


@pytest.mark.parametrize("label", [1, 1.0, True, "1", "1.0", "true", "True ", 0.8])
def test_a_label_may_be_written_as_tables_write_it(label):
    row = {"question": "x", "response_0": "a", "response_1": "b", "label": label}
    assert read(row)[1].chosen == "b"


@pytest.mark.parametrize("low, high", [(0, 1), (1, 0), (-3, 2.0)])
def test_either_end_of_a_label_may_be_the_larger_number(low, high):
    columns = f"prompt=x,chosen=a,rejected=b,label=win,low={low},high={high}"
    form = files.form_of_columns(columns)
    row = {"x": "?", "a": "first", "b": "second"}
    for win, better in ((low, "first"), (0.6 * low + 0.4 * high, "first"), (high, "second")):
        assert files.read_pair(row | {"win": win}, form)[1] == better
    with pytest.raises(files.TeachesNothing, match="no preference"):
        files.read_pair(row | {"win": (low + high) / 2}, form)
    with pytest.raises(files.BadRow, match="must be a number from"):
        files.read_pair(row | {"win": 3}, form)


def test_an_answer_by_another_model_is_kept():
    row = {"prompt": "x", "chosen": "a", "rejected": "b"}
    for response, given_answer in ((" c ", "c"), ("", None), (None, None), ([1], None)):
        assert read(row | {"response": response})[1].given == given_answer


def test_columns_named_by_the_user(tmp_path):
    row = {"q": {"text": TEXT}, "answers": [{"t": "b"}, {"t": "a"}]}
    columns = "prompt=q.text,chosen=answers.1.t,rejected=answers.0.t"
    path = write(tmp_path / "p.jsonl", [row])
    pairs, notes = read_pairs(path, columns=columns)
    assert pairs == [Pair(TURNS, "a", "b")]
    assert in_words(notes) == "1 read as q.text, answers.1.t, answers.0.t (--columns)"
    with pytest.raises(UserError, match="no answers.0.tx in these columns: q, answers"):
        read_pairs(path, columns=columns + "x")
    for wrong in ("prompt=q", "prompt=q,chosen=a,rejected=b,better=c", "q,a,b", "chosen=a=b"):
        with pytest.raises(UserError, match="name your columns"):
            read_pairs(path, columns=wrong)


# Rows that are no pairs

GOOD = b'{"prompt": "x", "chosen": "y", "rejected": "z"}'


def test_what_teaches_nothing_is_dropped_and_counted(tmp_path):
    good = json.loads(GOOD)
    tie = {"context": "x", "response1": "a", "response2": "b", "overall_preference": 0}
    rows = {
        "seen before": good,
        "equal answers": good | {"chosen": "z "},
        "an empty answer": good | {"chosen": " \n"},
        "no prompt": {"chosen": "\n\nHuman: \n\nAssistant: y", "rejected": "z"},
        "no preference": tie,
        "conversations that differ before the last answer": {
            "chosen": TEXT + " a",
            "rejected": "\n\nHuman: other\n\nAssistant: b",
        },
    }
    pairs, notes = read_pairs(write(tmp_path / "p.jsonl", [good, *rows.values()]))
    assert len(pairs) == 1
    assert {what for what in notes if "dropped" in what} == {f"dropped ({why})" for why in rows}
    assert in_words(notes).startswith("4 read as prompt, chosen, rejected (TRL), 1 dropped (seen")
    assert "2 read as chosen, rejected (Anthropic), 1 dropped (no prompt)" in in_words(notes)


ANSWERS = '"chosen": "a", "rejected": "b"}'
RESPONSES = '{"prompt": "x", "response_0": "a", "response_1": "b"'
BAD = {
    "{": "not a row in JSON",
    "[]": "not a row in JSON",
    "3": "not a row in JSON",
    "\x00": "not a row in JSON",
    "\udcff\udcfe{": "not a row in JSON",  # bytes that are no UTF-8
    '{"prompt": "na\udcefve", "chosen": "a", "rejected": "b"}': "`prompt` is not in UTF-8",
    '{"prompt": "x", "chosen": "y"}': "no prompt with two answers in these columns: prompt, chosen",
    '{"prompt": "x", "completion": "y", "label": true}': "KTO data has one answer per row",
    '{"prompt": "x", "response": "y"}': "SFT data has one answer per row",
    '{"messages": [{"role": "user", "content": "x"}]}': "SFT data has one answer per row",
    '{"query": "x", ' + ANSWERS: "no prompt with two answers in these columns: query, chosen",
    '{"prompt": "x", "chosen": "a<|im_end|>", "rejected": "b"}': "<|im_end|> is markup of a chat",
    '{"prompt": "x", "chosen": "a", "rejected": "b<|eot_id|>"}': "<|eot_id|> is markup of a chat",
    '{"prompt": "<s> [INST] x [/INST]", ' + ANSWERS: "is markup of a chat template",
    '{"prompt": "x", "response": "c</s>", ' + ANSWERS: "</s> is markup of a chat",
    '{"prompt": "x", "chosen": 3, "rejected": "b"}': "`chosen` must be",
    '{"prompt": "\\ud800", ' + ANSWERS: "`prompt` is not in UTF-8",
    '{"prompt": [1], ' + ANSWERS: "`prompt` must be",
    '{"prompt": [{"role": "tool", "content": "x"}], ' + ANSWERS: "a turn by a tool",
    '{"prompt": {"role": "assistant", "tool_calls": [{"id": 1}]}, ' + ANSWERS: "a turn by a tool",
    '{"prompt": {"role": "user", "content": [{"type": "image"}]}, ' + ANSWERS: "must be text",
    '{"prompt": {"role": "assistant", "content": "x"}, ' + ANSWERS: "must take turns",
    '{"prompt": {"role": "system", "content": "x"}, ' + ANSWERS: "must take turns",
    RESPONSES + "}": "no prompt with two answers in these columns: prompt, response_0",
    RESPONSES + ', "label": 2}': "`label` must be a number from 0 to 1: 2",
    RESPONSES + ', "label": NaN}': "`label` must be a number",
    RESPONSES + ', "label": "left"}': "`label` must be a number",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_and_can_be_skipped(tmp_path, line):
    path = tmp_path / "p.jsonl"
    path.write_bytes(GOOD + b"\n" + line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(UserError, match=f"p.jsonl, line 2: .*{re.escape(BAD[line])}") as error:
        read_pairs(str(path))
    *said, hint = str(error.value).splitlines()
    assert hint == "To go on without such rows: --skip-bad"
    # the forms only where the columns are the trouble
    assert len(said) == 1 or "no prompt with two answers in these" in said[0]
    pairs, notes = read_pairs(str(path), skip_bad=True)
    assert len(pairs) == 1 and notes["dropped (not a pair)"] == 1


def test_a_first_row_of_no_form_brings_the_list_of_forms_and_not_skip_bad(tmp_path):
    path = write(tmp_path / "p.jsonl", [{"a": "x" * 1000, "b": 1}, {"c": 1}])
    with pytest.raises(UserError, match="these columns: a, b\n") as error:
        read_pairs(path)
    text = str(error.value)
    assert all(form.chosen in text for form in files.FORMS if form.rejected != "-")
    assert (
        "--columns prompt=" in text and "--skip-bad" not in text and "\nThe row: {'a': 'x" in text
    )
    assert max(map(len, text.splitlines()[1:])) <= 100
    with pytest.raises(UserError, match="line 1: no prompt with two answers"):
        load_pairs(path, 10, 0, skip_bad=True)  # no other row is a pair
    path = write(tmp_path / "p.jsonl", [{"messages": TURNS}])
    with pytest.raises(UserError, match="SFT data has one answer.*\\nThe row: .'messages'"):
        read_pairs(path)


# Whatever a file holds

value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(categories=None), max_size=8)
    | st.sampled_from(
        [TEXT + " b", "\n\nHuman:", " ", "", "x" * 10_000, "\ud800", "\x00", "0", TURNS, SHAREGPT]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.fixed_dictionaries(
            {},
            optional={
                "role": st.sampled_from(["user", "assistant"]) | inner,
                "content": inner,
                "from": st.sampled_from(["human", "gpt"]),
                "value": inner,
                "text": inner,
                "0": inner,
            },
        )
    ),
    max_leaves=6,
)
row = st.sampled_from(files.FORMS).flatmap(
    lambda form: st.fixed_dictionaries(
        {name.split(".")[0]: value for name in (*form.columns(), "system", "response", "data")}
    )
)
line = (
    row.map(lambda row: json.dumps(row).encode())
    | st.binary(max_size=40)
    | value.map(lambda v: json.dumps(v).encode())
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from([[GOOD], []]),
    st.lists(line.map(lambda raw: raw.replace(b"\n", b" ")), max_size=4),
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]),
)
def test_whatever_a_file_holds_it_is_read_or_named(tmp_path_factory, first, lines, ending):
    """No other exception, no silent drop; what comes out fits a chat template and a tokenizer."""
    path = tmp_path_factory.getbasetemp() / f"any{ending}"
    path.write_bytes(b"\n".join([*first, *lines]))
    for skip_bad in (False, True):
        try:
            pairs, notes = read_pairs(str(path), skip_bad)
        except UserError as error:
            assert str(path) in str(error)
            continue
        rows = sum(number for what, number in notes.items() if what.startswith("rows"))
        dropped = sum(number for what, number in notes.items() if what.startswith("dropped"))
        assert len(pairs) + dropped >= rows  # a row without the columns of a pair is dropped, too
        if first and ending == ".jsonl":
            assert len(pairs) + dropped == 1 + sum(bool(raw.strip()) for raw in lines)
        for pair in pairs:
            assert pair.chosen != pair.rejected and files.is_prompt(pair.prompt)
            texts = [pair.chosen, pair.rejected, *(turn["content"] for turn in pair.prompt)]
            assert all(text.strip() and text.encode() for text in texts)


# Files, folders, hubs

ROWS = [
    {"prompt": f"Say {i},\n\u00fcber; \u201cso\u201d", "chosen": f"a{i}", "rejected": "b"}
    for i in range(5)
]


def table(separator, rows=ROWS):
    lines = [list(rows[0]), *(row.values() for row in rows)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in lines]
    return "\n".join(map(separator.join, quoted))


LINES = "\n\n".join(map(json.dumps, ROWS))
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}


@pytest.mark.parametrize(
    "name, content",
    {
        "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
        "LINES.JSONL": LINES.encode(),
        "lines.json": LINES.encode(),
        "list.json": json.dumps(ROWS, indent=1).encode(),
        "list.jsonl": json.dumps(ROWS).encode(),
        "data.json": json.dumps({"version": 1, "data": ROWS}).encode(),
        "train.json": json.dumps({"train": ROWS, "test": ROWS[:2]}).encode(),
        "columns.json": json.dumps(COLUMNS).encode(),
        "pandas.json": json.dumps({k: dict(enumerate(v)) for k, v in COLUMNS.items()}).encode(),
        "filtered.json": json.dumps(
            {k: dict(enumerate(v, 7)) for k, v in COLUMNS.items()}
        ).encode(),
        "null.json": json.dumps(COLUMNS | {"note": [None, *"abcd"]}).encode(),
        "utf16.jsonl": LINES.encode("utf-16"),
        "packed.jsonl.gz": gzip.compress(LINES.encode()),
        "packed.jsonl": gzip.compress(LINES.encode()),
        "packed.jsonl.bz2": bz2.compress(LINES.encode()),
        "packed.jsonl.zst": pyarrow.Codec("zstd").compress(LINES.encode(), asbytes=True),
        "plain.jsonl.gz": LINES.encode(),
        "comma.csv": table(",").encode(),
        "semicolon.csv": table(";").encode("utf-8-sig"),
        "tab.csv": table("\t").encode("utf-16"),
        "tab.TSV": table("\t").encode(),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_every_kind_of_file_gives_the_same_pairs(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    pairs, notes = read_pairs(str(tmp_path / name))
    assert pairs == [read(row)[1] for row in ROWS]
    assert in_words(notes) == "5 read as prompt, chosen, rejected (TRL)"


def test_parquet_folders_and_home(tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict

    rows = [row | {"prompt": TURNS} for row in ROWS]
    expected = [read(row)[1] for row in rows]
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "README.md").write_text("notes")
    Dataset.from_list(rows).to_parquet(tmp_path / "one" / "p.parquet")
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(tmp_path / "saved")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("one/p.parquet", "one", "saved", "saved/train"):
        assert read_pairs("~/" + name)[0] == expected
    (tmp_path / "one" / "q.parquet").touch()
    with pytest.raises(UserError, match="as one data set: .*\nGive one file."):
        read_pairs(str(tmp_path / "one"))
    (tmp_path / "one" / "b.csv").touch()
    with pytest.raises(UserError, match="has 3 data files. Give one file."):
        read_pairs(str(tmp_path / "one"))
    (tmp_path / "saved" / "train" / "state.json").write_text("{")
    with pytest.raises(UserError, match="saved: it cannot be read after the start"):
        read_pairs(str(tmp_path / "saved"))


def test_a_copy_of_a_hub_data_set_and_its_splits(tmp_path, monkeypatch):
    from datasets import Dataset, DatasetDict, config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("notes")
    (tmp_path / "hub" / "dataset_infos.json").write_text("{}")
    parts = {"train-00000-of-00002": ROWS[:2], "train-00001-of-00002": ROWS[2:], "test": ROWS}
    for name, rows in parts.items():
        Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "data" / f"{name}.parquet")
    assert read_pairs(str(tmp_path / "hub"))[0] == [read(row)[1] for row in ROWS]
    splits = {"train_prefs": Dataset.from_list(ROWS), "test_prefs": Dataset.from_list(ROWS)}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="the folder of one: test_prefs, train_prefs"):
        read_pairs(str(tmp_path / "saved"))
    assert len(read_pairs(str(tmp_path / "saved" / "test_prefs"))[0]) == len(ROWS)


@pytest.mark.parametrize("how", [{}, {"sort_keys": True}, {"indent": 2}], ids=str)
def test_messages_in_a_cell_of_a_table(tmp_path, how):
    cells = [json.dumps([turn], **how) for turn in (TURNS[2], said("a"), said("b"))]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], cells])
    assert read_pairs(str(tmp_path / "pairs.csv"))[0] == [Pair(TURNS[2:], "a", "b")]


def test_messages_that_break_off_are_one_bad_row(tmp_path):
    cells = [json.dumps([turn]) for turn in (TURNS[2], said("a"), said("b"))]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        broken = [cells[0][:-3], *cells[1:]]
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], broken, cells])
    with pytest.raises(
        UserError, match="line 2: `prompt` holds messages that are not JSON: cut off"
    ):
        read_pairs(str(tmp_path / "pairs.csv"))
    assert read_pairs(str(tmp_path / "pairs.csv"), skip_bad=True)[0] == [Pair(TURNS[2:], "a", "b")]


def test_messages_as_pandas_writes_them_are_no_text(tmp_path):
    """A policy would learn to write Python's quotes and braces."""
    cells = [str([turn]) for turn in (TURNS[2], said("a"), said("b"))]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], cells])
    with pytest.raises(UserError, match="line 2: `prompt` .* as pandas writes them"):
        read_pairs(str(tmp_path / "pairs.csv"))


def test_a_cell_may_hold_one_message_without_a_list(tmp_path):
    cells = [json.dumps(turn) for turn in (TURNS[2], said("a"), said("b"))]
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], cells])
    assert read_pairs(str(tmp_path / "pairs.csv"))[0] == [Pair(TURNS[2:], "a", "b")]


@pytest.mark.parametrize(
    "text",
    [
        *["[1]", "[]", "3", "[{}]", '[{"a": 1}]', "[x](y)", '{"value": 5}'],
        *['{"from": "Paris", "to": "Rome"}', '{"content": "x"} in YAML, please'],
    ],
)
def test_other_json_is_text(text):
    assert files.read_turns(text, "prompt") == [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    "row",
    [
        "[" * 200_000,
        '{"prompt": "p", "response_0": "a", "response_1": "b", "label": 1%s}',
        '{"prompt": "p", "response_0": "a", "response_1": "b", "label": "' + "[" * 200_000 + '"}',
    ],
)
def test_absurd_rows_are_bad_rows(tmp_path, row):
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    row = row.replace("%s", "0" * 400)
    (tmp_path / "pairs.jsonl").write_text(f"{good}\n{row}\n")
    with pytest.raises(UserError, match="line 2"):
        read_pairs(str(tmp_path / "pairs.jsonl"))
    assert len(read_pairs(str(tmp_path / "pairs.jsonl"), skip_bad=True)[0]) == 1


@pytest.mark.parametrize(
    "end, said",
    [
        ("label=d,low=bad", "two different numbers"),
        ("label=d,high=good", "two different numbers"),
        ("label=d,low=1", "two different numbers"),
        ("label=d,high=0.0", "two different numbers"),
        ("label=d,low=bad,high=bad", "two different numbers"),
        ("low=1,high=2", "add label="),
    ],
)
def test_the_ends_of_a_label_must_be_two_numbers_or_two_words(end, said):
    with pytest.raises(UserError, match=said):
        files.form_of_columns(f"prompt=a,chosen=b,rejected=c,{end}")


def test_a_column_whose_name_has_a_dot_can_be_named():
    row = {"a.b": "x", "c": {"d": "y"}}
    assert files.find(row, "a.b") == "x" and files.find(row, "c.d") == "y"


def test_a_file_of_a_single_row(tmp_path):
    pair = {"prompt": TURNS, "chosen": [said("a")], "rejected": [said("b")]}
    (tmp_path / "p.json").write_text(json.dumps(pair, indent=2))
    assert read_pairs(str(tmp_path / "p.json"))[0] == [Pair(TURNS, "a", "b")]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("p.jsonl.gz", gzip.compress(GOOD * 9, mtime=0)[:-9], "cannot be read after the start"),
        ("p.parquet", b"PAR1", "cannot be read after the start"),
        (
            "p.csv",
            "prompt,chosen,rejected\nna\u00efve,y,z\n".encode("cp1252"),
            "line 2: `prompt` is not in UTF-8. In Excel, save the file as .CSV UTF-8",
        ),
        ("p.csv", b'prompt,chosen,rejected\nx,y,z\n"3', "cannot be read after line 2"),
        ("p.csv", b"prompt,chosen,rejected\nQ,Yes, I can,No\n", "line 2: it has more cells"),
        ("p.csv", b"a,b\n1,2\n", "line 2: no prompt with two answers in these columns: a, b"),
        ("p.json", b"[1", "cannot be read"),
        ("p.json", b"3", "row 1: this is not a row in JSON"),
        ("p.json", b'{"prompt": ["a", "b"], "chosen": ["c"]}', "cannot be read"),
        ("p.txt", b"hello", "ending must be .json, "),
        ("p.jsonl.xz", b"", "ending must be .json, .*followed by .gz, .bz2 or .zst"),
    ],
)
def test_damaged_and_unknown_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_pairs(str(tmp_path / name))
    assert name in str(error.value).splitlines()[0]


@pytest.mark.parametrize(
    "source", ["nowhere.jsonl", "./nowhere", "~/nowhere", "nowhere.CSV.gz", r"C:\nowhere"]
)
def test_a_missing_file_is_not_looked_for_on_the_hub(source):
    with pytest.raises(UserError, match=r"there is no such file\.$"):
        read_pairs(source)


def test_a_hub_id_is_read_through_datasets_and_without_a_network_said(monkeypatch):
    import datasets

    asked = []
    rows = [{"chosen": TEXT + " a", "rejected": TEXT + " b"}]  # as Anthropic/hh-rlhf has them

    def load_dataset(*name, split):
        asked.append((*name, split))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    page = "https://huggingface.co/datasets/some/set"
    for source in ("hh", "hh:test", "some/set:test", "some/set:small:test", page, page + "/"):
        assert read_pairs(source)[0] == [Pair(TURNS, "a", "b")]
    hh = "Anthropic/hh-rlhf"
    whole = ("some/set", "train")
    parts = [("some/set", "test"), ("some/set", "small", "test")]
    assert asked == [(hh, "train"), (hh, "test"), *parts, whole, whole]
    monkeypatch.undo()
    with pytest.raises(UserError, match="no/such: it cannot be read after the start: .*Hub"):
        read_pairs("no/such")


# Rows to improve


def test_rows_to_improve(tmp_path):
    rows = [
        {"prompt": "hey", "response": " x ", "id": 7},
        {"prompt": TURNS, "response": ""},
        {"prompt": TEXT},
        {"prompt": "hey", "system": "Be brief."},
    ]
    path = write(tmp_path / "in.jsonl", rows)
    system = {"role": "system", "content": "Be brief."}
    assert files.read_rows(path) == [
        (rows[0], TURNS[2:], "x", f"{path}, line 1"),
        (rows[1], TURNS, None, f"{path}, line 2"),
        (rows[2], TURNS, None, f"{path}, line 3"),
        (rows[3], [system, *TURNS[2:]], None, f"{path}, line 4"),
    ]


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"response": "x"}', "no `prompt`, or an empty one, in: response"),
        ('{"prompt": " "}', "no `prompt`"),
        ('{"prompt": "x", "response": 3}', "`response` must be text"),
        ('{"prompt": 3}', "`prompt` must be"),
        ("[", "not a row in JSON"),
    ],
)
def test_a_bad_row_to_improve_is_named(tmp_path, row, message):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n' + row)
    with pytest.raises(UserError, match=f"in.jsonl, line 2: .*{message}"):
        files.read_rows(tmp_path / "in.jsonl")
