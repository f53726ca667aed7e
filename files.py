"""Every form in which people keep preference pairs, and rows to improve.

FILE                 .json, .jsonl, .csv, .tsv or .parquet, also in gzip, bzip2 or zstd
FOLDER               with one such file, or one that the library `datasets` reads: a copy of a
                     hub data set, or what `save_to_disk` wrote
hh, tldr, a hub id   through the same library; hh:test names a split other than train, and
                     NAME:CONFIG:SPLIT a configuration

To read one more form, add a line to TABLE. The tests go through it line by line.
"""

import codecs
import csv
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow
from pyarrow import parquet

from errors import UserError, explained

# A dot leads to a field within a column. The prompt may have several parts (+), of which the first
# must be there; "-" means transcripts, which hold the prompt. `chosen` is the better answer, unless
# there is a label: `low` prefers `chosen`, `high` prefers `rejected`, halfway is a tie.
TABLE = """
form            prompt              chosen           rejected             label             low high
TRL             prompt              chosen           rejected
Alpaca          instruction+input   chosen           rejected
Orca            question            chosen           rejected
Argilla-Orca    input               chosen           rejected
ShareGPT        conversations       chosen           rejected
Anthropic       -                   chosen           rejected
Argilla         prompt              chosen_response  rejected_response
UltraFeedback   instruction+input   chosen_response  rejected_response
Alpaca-outputs  instruction+input   output.0         output.1
OpenAI          input.messages      preferred_output non_preferred_output
labelled        prompt              response_0       response_1           label              0 1
PKU-SafeRLHF    prompt              response_0       response_1           better_response_id 0 1
labelled        question            response_0       response_1           label              0 1
labelled        question            response_0       response_1           better_response_id 0 1
Stanford-SHP    history             human_ref_B      human_ref_A          labels             0 1
WebGPT          question.full_text  answer_0         answer_1             score_1           -1 1
HelpSteer3      context             response1        response2            overall_preference -3 3
Summaries       info.title+info.post+info.article  summaries.0.text  summaries.1.text  choice 0 1
"""
# forms without a second answer, which are refused by name
UNPAIRED = """
KTO             prompt              completion       -                    label
SFT             prompt              completion       -
SFT             prompt              response         -
SFT             instruction         output           -
SFT             messages            -                -
SFT             conversations       -                -
SFT             text                -                -
"""

HUB = {"hh": "Anthropic/hh-rlhf", "tldr": "trl-lib/tldr-preference"}
KINDS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
ENDINGS = f"{', '.join(KINDS)}, alone or followed by .gz, .bz2 or .zst"
# the first bytes say how a file is compressed; its name may not
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
HUB_PAGE = "https://huggingface.co/datasets/"
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


# Text that begins like this, and has the other key of a message, too, holds chat messages: as JSON,
# as cells of tables do, or as Python prints them.
MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")
OTHER_KEY = {"role": "content", "content": "role", "from": "value", "value": "from"}
# markup of chat templates, at the beginning of a text or at its end
MARKUP = re.compile(
    r"^(<s>|<bos>)?\s*(<\|(im_start|start_header_id|begin_of_text|user|system)\|>|<start_of_turn>"
    r"|\[INST\])|(<\|(im_end|eot_id|endoftext)\|>|<end_of_turn>|</s>)$"
)


class BadRow(UserError):
    """A row or a prompt that cannot be read, and the reason."""


class TeachesNothing(ValueError):
    """A pair that does not say which answer is better, and the reason."""


@dataclass(frozen=True)
class Form:
    """A line of the table."""

    name: str
    prompt: str
    chosen: str
    rejected: str
    label: str = ""
    low: str = "0"
    high: str = "1"

    def reads(self):
        """The columns of a row that are read."""
        parts = [*self.prompt.split("+"), self.chosen, self.rejected, self.label]
        # a column's own name may have dots
        return {part.partition(".")[0] for part in parts} | {*parts, "system", "response"}

    def columns(self):
        """What a row of this form must have."""
        first_of_prompt = self.prompt.split("+")[0]
        names = (first_of_prompt, self.chosen, self.rejected, self.label)
        return [name for name in names if name not in ("", "-")]

    def missing(self, row):
        """Which of these a row lacks."""
        return [name for name in self.columns() if find(row, name) is None]

    def __str__(self):
        return f"{', '.join(self.columns())} ({self.name})"


FORMS = [Form(*line.split()) for line in (TABLE.strip() + UNPAIRED).splitlines()[1:]]
FORMS_HELP = f"""Known forms:{TABLE}For other columns: --columns prompt=...,chosen=...,rejected=...
If a label says which answer is better, add label=...,low=0,high=1 (its value when the first is
better, and when the second is; or words, such as low=model_a,high=model_b)"""


# From a source to its rows


def rows_of(source):
    """Yield (place, row) of a file, a folder or a hub data set."""
    place = "the start"
    try:
        for place, row in find_rows(source, Path(source).expanduser()):
            yield place, row
    except UserError:
        raise
    except Exception as error:  # each library has its own errors for a damaged file
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{source}: it cannot be read after {place}: {said}") from None


def find_rows(source, path):
    """The (place, row) of a folder, a file, or what a hub has by that name."""
    if path.is_dir():
        return rows_of_folder(path)
    if path.exists():
        return rows_of_file(path)
    if kind_of(path) in KINDS or source.startswith(("/", ".", "~")) or "\\" in source:
        raise UserError(f"{source}: there is no such file.")
    return rows_of_hub(source)


def kind_of(path):
    return Path(re.sub(r"\.(gz|bz2|zst)$", "", path.name.lower())).suffix


def numbered(rows):
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def rows_of_hub(source):
    """Rows of NAME, NAME:SPLIT or NAME:CONFIG:SPLIT, through the download cache of `datasets`."""
    from datasets import load_dataset  # takes a second, and few runs need it

    name, *which = source.removeprefix(HUB_PAGE).rstrip("/:").split(":")
    name = HUB.get(name, name)
    *config, split = which or ["train"]
    print(f"{name}: no file here; looking in the download cache and on the hub", flush=True)
    print(f"  for its split {split} (others: NAME:SPLIT, or NAME:CONFIG:SPLIT)", flush=True)
    return numbered(load_dataset(name, *config, split=split))


def rows_of_folder(path):
    """Rows of a folder: written by `save_to_disk`, with one data file, or as on the hub."""
    for saved in (path, path / "train"):
        if (saved / "state.json").exists():
            from datasets import load_from_disk

            return numbered(load_from_disk(saved))
    splits = sorted(file.parent.name for file in path.glob("*/state.json"))
    if splits:
        raise UserError(f"{path} has no split train. Give the folder of one: {', '.join(splits)}.")
    files = [file for file in path.glob("[!.]*") if kind_of(file) in KINDS]
    files = [file for file in files if file.name != "dataset_infos.json"]  # says nothing of rows
    if len(files) == 1:
        return rows_of_file(files[0])
    if {*map(kind_of, files)} - {".parquet"}:  # their columns have no types yet
        raise UserError(f"{path} has {len(files)} data files. Give one file.")
    from datasets import load_dataset

    print(f"{path}: reading its split train")
    with explained(f"{path}: its files cannot be read as one data set", "Give one file."):
        return numbered(load_dataset(str(path), split="train"))


def rows_of_file(path):
    """Rows of one file, which may be compressed (ENDINGS)."""
    kind = kind_of(path)
    if kind not in KINDS:
        raise UserError(f"{path}: the ending must be {ENDINGS}.")
    content = path.read_bytes()
    for first_bytes, codec in PACKED.items():
        if content.startswith(first_bytes):
            content = pyarrow.input_stream(io.BytesIO(content), compression=codec).read()
    if kind == ".parquet":
        return numbered(parquet.read_table(io.BytesIO(content)).to_pylist())
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # surrogateescape: `real_text` finds what is not UTF-8
    text = content.decode("utf-16" if is_utf16 else "utf-8-sig", "surrogateescape")
    return rows_of_table(text) if kind in (".csv", ".tsv") else rows_of_json(text)


def rows_of_table(text):
    """Rows between commas, semicolons or tabs; the place of a row is its last line."""
    header = text.partition("\n")[0]
    separator = max("\t;,", key=header.count)
    csv.field_size_limit(2**31 - 1)
    table = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    for row in table:
        yield f"line {table.line_num}", row


def rows_of_json(text):
    """Rows of one JSON value that holds them all, or one per line."""
    try:
        value = json.loads(text)
    except ValueError:
        if text.lstrip().startswith("["):  # one list of rows, and a broken one
            raise
        lines = enumerate(text.split("\n"), 1)
        return ((f"line {number}", line) for number, line in lines if line.strip())
    if isinstance(value, dict):
        value = rows_of_object(value)
    return numbered(value if isinstance(value, list) else [value])


def rows_of_object(table):
    """Rows of an object that holds a list of them, or columns, or is the only row itself."""
    for name in ("train", "data"):
        if isinstance(table.get(name), list):
            return table[name]
    # a column is [cell, ...] or, as pandas writes it, {"0": cell, ...}; a list of dicts is messages
    columns = []
    for cells in table.values():
        if isinstance(cells, dict) and all(map(str.isdigit, cells)):
            cells = [*cells.values()]
        columns.append(cells)
    if not all(isinstance(cells, list) for cells in columns):
        return [table]
    if all(isinstance(cell, dict) for cells in columns for cell in cells):
        return [table]
    return [dict(zip(table, cells)) for cells in zip(*columns, strict=True)]


# From a row to a pair


def read_columns(row):
    """A row, as a dict or a line of JSON -> {column: value}, without empty ones."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
        columns = row.items()
    except (ValueError, AttributeError, RecursionError):
        raise BadRow('this is not a row in JSON, {"column": ...}') from None
    if None in row:
        raise BadRow("it has more cells than the header has names: is a comma unquoted?")
    return {name: value for name, value in columns if value is not None}


def find(row, path):
    """The value of a column, or of a field within it; None if it is not there."""
    if isinstance(row, dict) and path in row:  # a column's own name may have dots
        return row[path]
    value = row
    for key in path.split("."):
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return value


def form_of_columns(text):
    """--columns prompt=...,chosen=...,rejected=... -> its form."""
    try:
        named = dict(map(str.strip, part.split("=")) for part in text.split(","))
        form = Form("--columns", **named)
    except (TypeError, ValueError):
        raise UserError(
            f"--columns {text}: name your columns: prompt=...,chosen=...,rejected=...\n"
            "A dot leads to a field within a column: answers.0.text. For transcripts: prompt=-"
        ) from None
    words = [end for end in (form.low, form.high) if math.isnan(number_in(end))]
    same = form.low == form.high or number_in(form.low) == number_in(form.high)
    if same or len(words) == 1:
        raise UserError("--columns: low and high must be two different numbers, or two words.")
    if named.keys() & {"low", "high"} and not form.label:
        raise UserError("--columns: low and high are values of a label: add label=...")
    return form


def find_form(row, forms):
    """The first of `forms` that fits a row."""
    columns = ", ".join(row)[:200]
    for form in forms:
        missing = form.missing(row)
        if not missing:
            if form.rejected == "-":
                raise BadRow(f"{form.name} data has one answer per row, a pair has two: {columns}")
            return form
    if len(forms) == 1:  # that of --columns
        raise BadRow(f"no {', '.join(missing)} in these columns: {columns}")
    raise BadRow(no_form(row))


def no_form(row):
    return f"no prompt with two answers in these columns: {', '.join(row)[:200]}\n{FORMS_HELP}"


def read_pair(row, form):
    """A row of a form -> prompt (messages), chosen, rejected, another model's answer or None."""
    prompt = []
    for name in form.prompt.split("+"):
        prompt += read_turns(find(row, name) or "", name)
    prompt = join_turns(prompt)
    # each answer, and the turns that it follows
    before, chosen = read_answer(row, form.chosen, prompt)
    also_before, rejected = read_answer(row, form.rejected, prompt)
    if form.label and label_is_high(row, form):
        chosen, rejected = rejected, chosen
    if chosen == rejected:
        raise TeachesNothing("equal answers")
    if before != also_before:
        raise TeachesNothing("conversations that differ before the last answer")
    if not before and form.prompt == "-" and "Human:" not in str(find(row, form.chosen)):
        raise BadRow(no_form(row))
    if not before:
        raise TeachesNothing("no prompt")
    before = with_system_message(before, row)
    if not is_prompt(before):
        raise BadRow(
            "in the prompt, user and assistant must take turns, the user first and last; "
            "a system message may come before them"
        )
    given = row.get("response")
    given = real_text(given, "response") if isinstance(given, str) else ""
    for text in (chosen, rejected, given, *[turn["content"] for turn in before]):
        if found := MARKUP.search(text):
            raise BadRow(f"{found[0]} is markup of a chat template. Give messages, or plain text")
    return before, chosen, rejected, given or None


def with_system_message(turns, row):
    """The conversation may have a system message. If not, the row may have one in a column."""
    if turns[0]["role"] != "system":
        turns = read_turns(row.get("system", ""), "system", "system") + turns
    return turns


def is_prompt(turns):
    """Whether user and assistant take turns, the user first and last, as chat templates require."""
    speakers = " ".join(turn["role"] for turn in turns)
    return bool(re.fullmatch("(system )?(user assistant )*user", speakers))


def read_answer(row, column, prompt):
    """An answer, or a conversation that ends in it -> (all turns before the answer, the answer)."""
    turns = read_turns(find(row, column), column, "assistant")
    if not turns or turns[-1]["role"] != "assistant":
        raise TeachesNothing("an empty answer")
    *before, answer = turns
    # the conversation may repeat the prompt: as all of it, at its beginning or at its end (so it
    # does where the prompt is empty, as with transcripts)
    length = len(prompt)
    repeated = prompt in (before[:length], before[-length:])
    return before if repeated else prompt + before, answer["content"]


def label_is_high(row, form):
    """Whether the label prefers `form.rejected`. Files write it as 1, 1.0, "1", true, or a word."""
    text = str(find(row, form.label)).strip().lower()
    low = number_in(form.low)
    high = number_in(form.high)
    if math.isnan(low):  # words, such as model_a and model_b; any other is a tie
        if text not in (form.low.lower(), form.high.lower()):
            raise TeachesNothing(f"no preference: {text[:20]}")
        return text == form.high.lower()
    # 0 at `low`, 1 at `high`, whichever is the larger number
    position = (number_in(text) - low) / (high - low)
    if not 0 <= position <= 1:
        raise BadRow(f"`{form.label}` must be a number from {form.low} to {form.high}: {text[:20]}")
    if position == 0.5:
        raise TeachesNothing("no preference")
    return position > 0.5


def number_in(text):
    """The number that a text is, or NaN."""
    try:
        return float(json.loads(text))
    except (ValueError, TypeError, OverflowError, RecursionError):
        return math.nan


def read_turns(value, column, speaker="user"):
    """Text, a message or a list of messages -> messages by speakers in turn, no empty ones."""
    if isinstance(value, str) and holds_messages(value):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(
                f"`{column}` holds messages that are not JSON: cut off, or as pandas writes them "
                "to a .csv. Save them as .jsonl or .parquet"
            ) from None
    elif isinstance(value, str):
        value = read_transcript(value) or {"role": speaker, "content": value}
    messages = value if isinstance(value, list) else [value]
    return join_turns([read_message(message, column) for message in messages])


def holds_messages(text):
    """Whether text is made of messages, not merely of JSON."""
    start = MESSAGES.match(text)
    return start and re.search(rf"""["']{OTHER_KEY[start[1]]}["']\s*:""", text)


def read_transcript(text):
    r"""The turns of "\n\nHuman: ... \n\nAssistant: ...", or none if the text is no such thing."""
    text = text.replace("\r\n", "\n")
    if not re.match(r"\n\nHuman:|\s*Human:.*\nAssistant:", text, re.DOTALL):
        return []
    is_parted = text.startswith("\n\nHuman:") or "\n\nAssistant:" in text
    between = "\n\n" if is_parted else "\n"
    parts = re.split(f"{between}(Human|Assistant):", between + text.lstrip())[1:]
    return [{"role": who, "content": said} for who, said in zip(parts[::2], parts[1::2])]


def read_message(message, column):
    """A message as OpenAI or ShareGPT write it -> {"role": ..., "content": ...}."""
    if not isinstance(message, dict):
        raise BadRow(f"`{column}` must be text, or messages with `role` and `content`")
    speaker = str(message.get("role", message.get("from"))).lower()
    if speaker not in ROLES or message.get("tool_calls"):
        raise BadRow(f"`{column}` has a turn by a tool, or by a role other than {', '.join(ROLES)}")
    content = message.get("content", message.get("value"))
    if isinstance(content, list):  # parts, such as {"type": "text", "text": ...}
        content = "\n\n".join(real_text(find(part, "text"), column) for part in content)
    return {"role": ROLES[speaker], "content": real_text(content, column)}


def join_turns(turns):
    """Leave out empty turns, and join those in a row by one speaker: many templates require it."""
    joined = []
    for turn in turns:
        if turn["content"] and joined and joined[-1]["role"] == turn["role"]:
            joined[-1]["content"] += "\n\n" + turn["content"]
        elif turn["content"]:
            joined.append(turn)
    return joined


def real_text(value, column):
    if not isinstance(value, str):
        raise BadRow(f"`{column}` must be text, and nothing else")
    if re.search("[\ud800-\udfff]", value):
        raise BadRow(f'`{column}` is not in UTF-8. In Excel, save the file as "CSV UTF-8"')
    return value.replace("\r\n", "\n").strip()


# Rows to improve


class Request(NamedTuple):
    """A prompt to answer, or an answer to improve."""

    row: dict  # all its columns
    prompt: list  # messages
    response: str | None  # the answer, if there is one
    place: str  # file and line


def read_rows(source):
    """The rows of a file with `prompt` and, if they have an answer, `response` -> [Request]."""
    requests = []
    for number, row in rows_of(str(source)):
        place = f"{source}, {number}"
        try:
            row = read_columns(row)
            prompt = read_turns(row.get("prompt", ""), "prompt")
            response = real_text(row.get("response", ""), "response")
            if not prompt:
                raise BadRow(f"no `prompt`, or an empty one, in: {', '.join(row)[:200]}")
            prompt = with_system_message(prompt, row)
        except BadRow as error:
            raise UserError(f"{place}: {error}.") from None
        requests.append(Request(row, prompt, response or None, place))
    if not requests:
        raise UserError(f"{source} holds no rows.")
    return requests
