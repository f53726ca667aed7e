"""Every form in which people keep preference pairs, and rows to improve.

FILE                 .json, .jsonl, .csv or .parquet, in any of the forms listed below
hh, tldr, a hub id   the same forms, through the library `datasets`
"""

import csv
import gzip
import io
import json
import re
import zlib
from pathlib import Path

from pyarrow import ArrowException, parquet

from errors import UserError, first_line

#
#   prompt, chosen, rejected                     text or chat messages (TRL's forms; chosen may hold the prompt as well)
#   chosen, rejected                             transcripts that begin alike and part at the last answer (Anthropic's)
#   instruction (, input), chosen, rejected      or `question` in place of `instruction`
#   question, response_0, response_1, label      the label (or better_response_id) is the number of the better answer

HUB = {"hh": "Anthropic/hh-rlhf", "tldr": "trl-lib/tldr-preference"}
FILES = ".json, .jsonl, .csv or .parquet (.gz)"
TRANSCRIPT = re.compile(r"\s*Human:")


class BadRow(ValueError):
    """A row that is not a pair, and why."""


def rows_of_file(path):
    """Yield (place, row) for each row of a file; a row of a .jsonl file is its line, in bytes."""
    kind, place, unit = Path(path.name.removesuffix(".gz")).suffix, "the start", "row"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if kind == ".parquet":
                rows = enumerate(parquet.read_table(io.BytesIO(file.read())).to_pylist(), 1)
            elif kind == ".csv":
                csv.field_size_limit(2**31 - 1)
                table, unit = (
                    csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True),
                    "line",
                )
                rows = (
                    (table.line_num, {name: read_cell(text) for name, text in row.items()})
                    for row in table
                )
            elif kind == ".json" and file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(
                b"["
            ):  # one list of rows
                rows = enumerate(json.loads(file.read().decode("utf-8-sig")), 1)
            elif kind in (".json", ".jsonl"):
                rows, unit = (
                    ((number, line) for number, line in enumerate(file, 1) if line.strip()),
                    "line",
                )
            else:
                raise UserError(f"{path}: the ending must be {FILES}.")
            for number, row in rows:
                place = f"{unit} {number}"
                yield place, row
    except (
        OSError,
        EOFError,
        ValueError,
        RecursionError,
        ArrowException,
        csv.Error,
        zlib.error,
    ) as error:
        raise UserError(f"{path}: it cannot be read after {place}: {first_line(error)}") from None


def read_cell(text):
    """A cell of a .csv file: messages where it holds them as JSON, else its text."""
    if isinstance(text, str) and re.match(r'\[\{"(role|content)"', text):
        try:
            return json.loads(text)
        except ValueError:
            pass
    return text


def rows_of_hub(source):
    """Yield (place, row) of a hub data set; "id:split" names a split other than train."""
    if source.endswith((".json", ".jsonl", ".csv", ".parquet", ".gz")):
        raise UserError(
            f"--data {source}: there is no such file. Give {FILES}, or: hh, tldr, a hub id, synthetic"
        )
    from datasets import load_dataset

    name, _, part = HUB.get(source, source).partition(":")
    print(f"{name}: looking for it where downloads are kept, and on the hub", flush=True)
    try:
        for number, row in enumerate(load_dataset(name, split=part or "train"), 1):
            yield f"row {number}", row
    except (
        Exception
    ) as error:  # of many kinds: no network, no such id, no such split, a loading script
        raise UserError(
            f"--data {source}: there is no such file, and the hub does not give it: {first_line(error)}\n"
            f"Give a local file, {FILES}, or the built-in task: --data synthetic"
        ) from None


def read_columns(row):
    """A line of JSON, or what is to be a dict already -> {column: value}, without the empty ones."""
    try:
        row = json.loads(row.decode("utf-8-sig")) if isinstance(row, bytes) else row
    except (ValueError, RecursionError):
        raise BadRow("this is not JSON in UTF-8") from None
    if not isinstance(row, dict):
        raise BadRow("this is not an object with columns")
    if None in row:
        raise BadRow("it has more cells than the header has names: is a comma not in quotes?")
    return {name: value for name, value in row.items() if value is not None}


def read_row(row):
    """A row in any of the forms above -> the columns used, and a Pair, or why it teaches nothing. Raises BadRow."""
    row = read_columns(row)
    asked = [name for name in ("prompt", "instruction", "question") if name in row][:1]
    more = ["input"] if asked == ["instruction"] and row.get("input") else []
    answers, label = ["chosen", "rejected"], []
    if row.keys().isdisjoint(answers) and not row.keys().isdisjoint(("response_0", "response_1")):
        answers = ["response_0", "response_1"]
        label = ["better_response_id" if "better_response_id" in row else "label"]
    columns = [*asked, *more, *answers, *label]
    for name in columns:
        if name not in row:
            raise BadRow(f"there is no `{name}`")
    prompt = read_turns(row[asked[0]], asked[0]) if asked else []
    if more:
        prompt = read_turns([*prompt, {"role": "user", "content": row["input"]}], "input")
    (before, chosen), (also_before, rejected) = (
        read_answer(row[name], name, prompt, asked) for name in answers
    )
    better = str(row[label[0]]).strip().lower().removesuffix(".0") if label else "0"
    better = {"false": "0", "true": "1"}.get(better, better)
    if better not in ("0", "1"):
        raise BadRow(
            f"`{label[0]}` must be 0 or 1, the number of the better answer, and is {better[:20]!r}"
        )
    pair = (before, chosen, rejected) if better == "0" else (before, rejected, chosen)
    if not chosen or not rejected:
        pair = "an empty answer"
    elif chosen == rejected:
        pair = "equal answers"
    elif before != also_before:
        pair = "transcripts that part too early"
    elif not before:
        pair = "an empty prompt"
    elif not is_prompt(before):
        raise BadRow(
            "the prompt must be turns of user and assistant, the user's first and last (system: before all)"
        )
    return ", ".join(columns), pair


def is_prompt(turns):
    """Whether user and assistant take turns, the user first (after the system, if that speaks) and last: templates insist."""
    speakers = [turn["role"] for turn in turns]
    speakers = speakers[speakers[:1] == ["system"] :]
    return (
        len(speakers) % 2 == 1
        and speakers == (["user", "assistant"] * len(speakers))[: len(speakers)]
    )


def read_answer(value, column, prompt, asked):
    """An answer after the turns of `prompt`, or a transcript that ends in it -> (all turns before the answer, the answer)."""
    if isinstance(value, str) and not TRANSCRIPT.match(value) and not asked:
        raise BadRow(f"there is no `prompt`, and `{column}` is no transcript")
    turns = read_turns(value, column, "assistant")
    if not turns or turns[-1]["role"] != "assistant":
        return turns, ""
    *before, last = turns
    n = len(prompt)  # the prompt may be all of what comes before, its beginning, or its end
    return before if prompt in (before[:n], before[-n:]) else prompt + before, last["content"]


def read_turns(value, column, speaker="user"):
    """Text or chat messages -> messages, empty ones left out and neighbours by one speaker joined: many templates insist."""
    turns = []
    messages = dialogue(value, speaker) if isinstance(value, str) else value
    if not isinstance(messages, list):
        messages = [None]
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise BadRow(
                f"`{column}` must be text, or a list of messages with `role` and `content`"
            )
        role, said = message["role"], real_text(message["content"], column)
        if role not in ("system", "user", "assistant") or role == "system" and turns:
            raise BadRow(
                f"`{column}`: the roles are user and assistant, and system for the first message alone"
            )
        if said and turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + said
        elif said:
            turns.append({"role": role, "content": said})
    return turns


def real_text(value, column):
    if not isinstance(value, str):
        raise BadRow(f"`{column}` must be text")
    if re.search("[\ud800-\udfff]", value):
        raise BadRow(f"`{column}` holds half a character (a lone surrogate)")
    return value.strip()


def dialogue(text, speaker="user"):
    """Text -> chat messages: the turns of Anthropic's "\\n\\nHuman: ... \\n\\nAssistant:" form, or one message by `speaker`."""
    if not TRANSCRIPT.match(text):
        return [{"role": speaker, "content": text.strip()}]
    parts = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])
    ]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def read_rows(path):
    """Rows with a `prompt` (text or messages), maybe a `response` -> [(row, messages, response or None, file and line)]."""
    rows = []
    for place, row in rows_of_file(path):
        try:
            row = read_columns(row)
            if "prompt" not in row:
                raise BadRow("there is no `prompt`")
            prompt = read_turns(row["prompt"], "prompt")
            response = real_text(row["response"], "response") if "response" in row else None
            if not prompt or response == "":
                raise BadRow("neither `prompt` nor `response` may be empty")
        except BadRow as error:
            raise UserError(f"{path}, {place}: {error}.") from None
        rows.append((row, prompt, response, f"{path}, {place}"))
    return rows
