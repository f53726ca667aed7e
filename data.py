"""Preference pairs: where they come from, how they are split, and how (x, y_ref) becomes a prompt.

A *pair* is (prompt, chosen, rejected): a list of chat messages, the better answer, the worse answer. It is all that PIT
ever learns from: nobody writes down *why* one answer is better.

Three sources:
  synthetic            the built-in task of task.py, made on the spot
  FILE                 .json, .jsonl, .csv or .parquet, in any of the forms listed under "pairs, from anywhere"
  hh, tldr, a hub id   the same forms, through the library `datasets`

This file knows nothing of models.
"""

import csv
import gzip
import io
import json
import random
import re
import zlib
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import datasets  # before torch, which run imports: on Windows it must be
from pyarrow import ArrowException, parquet

import task
from errors import UserError, first_line

IMPROVE = "Please improve your answer."  # our wording, the paper's is not known: a natural turn, without any rubric in words


def improve_prompt(prompt, reference):
    """(x, y_ref) as chat messages. M_PIT writes y after them, and R_PIT(x, y, y_ref) scores the very same tokens."""
    return [*prompt, {"role": "assistant", "content": reference}, {"role": "user", "content": IMPROVE}]


def max_length(cfg):
    """Tokens of the longest sequence in training: x, y_ref, "Please improve your answer.", y."""
    return cfg.max_prompt + 2 * cfg.max_response + 16  # the words of IMPROVE, and the template's tokens around its turn


# ---- pairs, from anywhere --------------------------------------------------------------------------------------------------
#
#   prompt, chosen, rejected                     text or chat messages (TRL's forms; chosen may hold the prompt as well)
#   chosen, rejected                             transcripts that begin alike and part at the last answer (Anthropic's)
#   instruction (, input), chosen, rejected      or `question` in place of `instruction`
#   question, response_0, response_1, label      the label (or better_response_id) is the number of the better answer

HUB = {"hh": "Anthropic/hh-rlhf", "tldr": "trl-lib/tldr-preference"}
FILES = ".json, .jsonl, .csv or .parquet (.gz)"
TRANSCRIPT = re.compile(r"\s*Human:")


@dataclass(frozen=True)
class Pair:
    prompt: list  # chat messages, the last one by the user
    chosen: str  # y_w
    rejected: str  # y_l

    def key(self):
        return json.dumps([self.prompt, self.chosen, self.rejected])


class BadRow(ValueError):
    """A row that is not a pair, and why."""


def synthetic_pairs(n, seed):
    """n pairs: a chosen answer with few flaws, and a rejected one with more put into it.

    The chosen one meets at least one requirement more. That the two are versions of one text, as drafts are, is what lets
    M_PIT^SFT see that improving means keeping most of y_ref.
    """
    rng, pairs = random.Random(seed), []
    while len(pairs) < n:
        people = task.draw_people(rng)
        good = task.spoil(task.solve(people), rng.randint(0, 2), rng, kinds=("end", "end", "short"))
        better, worse = task.tell(good), task.tell(task.spoil(good, rng.randint(1, 4), rng))
        prompt = task.ask(people)
        if task.quality(prompt, better) > task.quality(prompt, worse):
            pairs.append(Pair([{"role": "user", "content": prompt}], better, worse))
    return pairs


def load_pairs(source, n, seed, skip_bad=False):
    """At most n pairs from "synthetic", a file or a hub data set -> pairs, and a count of what was read and dropped.

    A row that teaches nothing (equal or empty answers, seen before) is dropped and counted. A row that is no pair raises
    UserError with file and line, unless skip_bad. Of more than n, the seed draws n: many sets are in order of topic.
    """
    if source == "synthetic":
        return synthetic_pairs(n, seed), Counter()
    notes, kept = Counter(), {}
    rows = rows_of_file(Path(source)) if Path(source).exists() else rows_of_hub(source)
    for place, row in rows:
        try:
            columns, pair = read_row(row)
        except BadRow as error:
            if not skip_bad:
                raise UserError(f"{source}, {place}: {error}. To go on without such rows: --skip-bad") from None
            columns, pair = "another form", "not a pair"
        notes[f"rows of {columns}"] += 1
        if isinstance(pair, str):
            notes[f"dropped ({pair})"] += 1
        elif kept.setdefault(pair.key(), pair) is not pair:
            notes["dropped (seen before)"] += 1
    if not kept:
        raise UserError(f"--data {source} holds no pair to learn from: {describe(notes) or 'it is empty'}.")
    pairs = list(kept.values())
    if len(pairs) > n:
        notes["left out (more than --pairs)"] = len(pairs) - n
        pairs = random.Random(seed).sample(pairs, n)
    return pairs, notes


def describe(notes):
    return ", ".join(f"{number:,} {what}" for what, number in notes.items() if number)


def rows_of_file(path):
    """Yield (place, row) for each row of a file; a row of a .jsonl file is its line, in bytes."""
    kind, place, unit = Path(path.name.removesuffix(".gz")).suffix, "the start", "row"
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            if kind == ".parquet":
                rows = enumerate(parquet.read_table(io.BytesIO(file.read())).to_pylist(), 1)
            elif kind == ".csv":
                csv.field_size_limit(2**31 - 1)
                table, unit = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True), "line"
                rows = ((table.line_num, {name: read_cell(text) for name, text in row.items()}) for row in table)
            elif kind == ".json" and file.peek(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):  # one list of rows
                rows = enumerate(json.loads(file.read().decode("utf-8-sig")), 1)
            elif kind in (".json", ".jsonl"):
                rows, unit = ((number, line) for number, line in enumerate(file, 1) if line.strip()), "line"
            else:
                raise UserError(f"{path}: the ending must be {FILES}.")
            for number, row in rows:
                place = f"{unit} {number}"
                yield place, row
    except (OSError, EOFError, ValueError, RecursionError, ArrowException, csv.Error, zlib.error) as error:
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
        raise UserError(f"--data {source}: there is no such file. Give {FILES}, or: hh, tldr, a hub id, synthetic")
    name, _, part = HUB.get(source, source).partition(":")
    print(f"{name}: looking for it where downloads are kept, and on the hub", flush=True)
    try:
        for number, row in enumerate(datasets.load_dataset(name, split=part or "train"), 1):
            yield f"row {number}", row
    except Exception as error:  # of many kinds: no network, no such id, no such split, a loading script
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
    (before, chosen), (also_before, rejected) = (read_answer(row[name], name, prompt, asked) for name in answers)
    better = str(row[label[0]]).strip().lower().removesuffix(".0") if label else "0"
    better = {"false": "0", "true": "1"}.get(better, better)
    if better not in ("0", "1"):
        raise BadRow(f"`{label[0]}` must be 0 or 1, the number of the better answer, and is {better[:20]!r}")
    pair = Pair(before, chosen, rejected) if better == "0" else Pair(before, rejected, chosen)
    if not chosen or not rejected:
        pair = "an empty answer"
    elif chosen == rejected:
        pair = "equal answers"
    elif before != also_before:
        pair = "transcripts that part too early"
    elif not before:
        pair = "an empty prompt"
    elif not is_prompt(before):
        raise BadRow("the prompt must be turns of user and assistant, the user's first and last (system: before all)")
    return ", ".join(columns), pair


def is_prompt(turns):
    """Whether user and assistant take turns, the user first (after the system, if that speaks) and last: templates insist."""
    speakers = [turn["role"] for turn in turns]
    speakers = speakers[speakers[:1] == ["system"] :]
    return len(speakers) % 2 == 1 and speakers == (["user", "assistant"] * len(speakers))[: len(speakers)]


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
            raise BadRow(f"`{column}` must be text, or a list of messages with `role` and `content`")
        role, said = message["role"], real_text(message["content"], column)
        if role not in ("system", "user", "assistant") or role == "system" and turns:
            raise BadRow(f"`{column}`: the roles are user and assistant, and system for the first message alone")
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
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


def fit(pairs, count_prompt, count_answer, max_prompt, max_response, notes):
    """The pairs within two lengths, in tokens as the functions count them; what is cut and dropped is added to `notes`.

    A prompt loses its oldest turns, then the oldest words of its last one. An answer is never cut: without its end it would
    teach not to stop, with an end put in, to stop in mid-sentence; and people's verdict was on the whole of it.
    """
    kept = {}
    for pair in pairs:
        prompt = shorten(pair.prompt, count_prompt, max_prompt)
        if max(count_answer(pair.chosen), count_answer(pair.rejected)) > max_response:
            notes[f"dropped (an answer over {max_response} tokens)"] += 1
        elif prompt is None:
            notes[f"dropped (a prompt that no cut brings to {max_prompt} tokens)"] += 1
        elif (cut := Pair(prompt, pair.chosen, pair.rejected)).key() in kept:
            notes["dropped (seen before, once cut)"] += 1
        else:
            notes[f"prompts cut to {max_prompt} tokens"] += prompt != pair.prompt
            kept[cut.key()] = cut
    return list(kept.values())


def shorten(prompt, count, longest):
    """The longest end of `prompt` within `longest` tokens, its system message kept -> messages, or None."""
    if count(prompt) <= longest:
        return prompt
    system = [turn for turn in prompt if turn["role"] == "system"]
    starts = [(i, 0) for i, turn in enumerate(prompt) if turn["role"] == "user"]  # (turn, character)
    starts += [(len(prompt) - 1, space.end()) for space in re.finditer(r"\s+", prompt[-1]["content"])]

    def from_start(start):
        turn, character = start
        return [*system, prompt[turn] | {"content": prompt[turn]["content"][character:]}, *prompt[turn + 1 :]]

    first = bisect_left(starts, True, key=lambda start: count(from_start(start)) <= longest)
    return from_start(starts[first]) if first < len(starts) else None


PARTS = {"held_out": 0.10, "judge": 0.15, "sft": 0.25, "rm": 0.25, "rl": 0.25}  # equal thirds, after the parts that judge


def split(pairs, seed, notes=None):
    """Deal the pairs out by prompt, so that no prompt is in two parts -> {part: [Pair]}, the same on every machine."""
    by_prompt = {}
    for pair in pairs:
        by_prompt.setdefault(json.dumps(pair.prompt), []).append(pair)
    groups = [by_prompt[key] for key in sorted(by_prompt)]
    random.Random(seed).shuffle(groups)
    parts, start = {}, 0.0
    for name, share in PARTS.items():
        chosen = groups[round(start * len(groups)) : round((start + share) * len(groups))]
        parts[name] = [pair for group in chosen for pair in group]
        start += share
        if len(parts[name]) < 8:
            few = f"{len(pairs)} pairs of {len(groups)} prompts are too few: the part {name!r} would get {len(parts[name])}"
            raise UserError(f"{few}, and needs 8." + (f"\nThe data: {describe(notes)}" if notes else ""))
    return parts
