"""Preference pairs: where they come from, how they are split, and how they become text.

A *pair* is (prompt, chosen, rejected): a list of chat messages, the better answer, the worse answer. It is all that PIT
ever learns from: nobody writes down *why* one answer is better.

Two sources:
  synthetic       the built-in task, who looks where in the end (below): made on the spot, with an exact quality function
  FILE.jsonl      one JSON object a line (the file may be gzipped): prompt (text, or a list of chat messages), chosen, rejected

Two prompt templates, both natural turns without any rubric in words (the paper's own template is not known):
  answer          x                               the policy M_P answers
  improve         x, y_ref, "Please improve ..."   M_PIT writes a better y; R_PIT reads the same turns and then y

This file knows nothing of models, and only the judge in evaluate.py may call `quality`.
"""

import gzip
import json
import random
import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from run import UserError

IMPROVE = "Please improve your answer."  # our own wording; the paper's is open

# ---------------------------------------------------------------------------------------------------------------------
# The synthetic task: where does each look in the end?
# ---------------------------------------------------------------------------------------------------------------------
#
#   prompt    Where does each look in the end? Ann north: left left back. Ben west: right left right.
#   perfect   Now Ann north: west south north. Ben north: north west north.
#   flawed    Now Ann east: west south north. Ben north: north west.        (Ann's end is wrong, Ben's way too short)
#
# Why self-improvement has something to show here. A line says where somebody looks in the end before the way to it, as people
# like to. The way is easy, one turn after the other. The end, said first, takes all the turns at once: a small model guesses,
# however many right answers it has read. In a draft the way can be read, and the end is its last word: what was hard to say
# at first is easy to put right.

NAMES = (
    "Ada Amy Ann Ben Bob Dan Eli Eva Fay Gus Ian Ida Jan Jim Joe Kay Lea Leo Max May Mia Ned Pam Ray Ron Roy Sam Sue Tim Tom "
    "Una Zoe".split()
)
LOOKS = "north east south west".split()  # clockwise
TURNS = {"right": 1, "back": 2, "left": 3}  # in quarters, clockwise


def ask(people):
    """The prompt about `people`: {name: (where he or she looks at first, turns)}."""
    lines = [f"{name} {start}: {' '.join(turns)}." for name, (start, turns) in people.items()]
    return f"Where does each look in the end? {' '.join(lines)}"


def asked_about(prompt):
    """The people in a prompt."""
    lines = re.findall(r"(\w+) (\w+): ([\w ]+)\.", prompt)
    return {name: (start, turns.split()) for name, start, turns in lines}


def solve(people):
    """The perfect answer about `people` -> {name: (end, way)}, the way being where he or she looks after each turn."""
    lines = {}
    for name, (start, turns) in people.items():
        quarters = accumulate((TURNS[turn] for turn in turns), initial=LOOKS.index(start))
        way = [LOOKS[quarter % 4] for quarter in quarters][1:]
        lines[name] = (way[-1], way)
    return lines


def tell(lines):
    """The answer that says `lines`."""
    return "Now " + " ".join(f"{name} {end}: {' '.join(way)}." for name, (end, way) in lines.items())


def read(answer):
    """The lines of an answer -> {name: (end, way)}. What has not the form of a line is not read."""
    return {name: (end, way.split()) for name, end, way in re.findall(r"(\w+) (\w+): ([\w ]+)\.", answer)}


def quality(prompt, answer):
    """The share of the prompt's requirements that the answer meets, in [0, 1]: exact, and for judging alone.

    With n people there are 2n + 1: for each the right end and the right way, and nothing else besides.
    """
    perfect, told = solve(asked_about(prompt)), read(answer)
    met = [bool(told) and set(told) <= set(perfect) and answer == tell(told)]
    for name, (end, way) in perfect.items():
        told_end, told_way = told.get(name, ("", []))
        met += [told_end == end, told_way == way]
    return sum(met) / len(met)


def draw_people(rng):
    """Three people, who turn three to five times each."""
    return {
        name: (rng.choice(LOOKS), [rng.choice([*TURNS]) for _ in range(rng.randint(3, 5))]) for name in rng.sample(NAMES, 3)
    }


def spoil(lines, flaws, rng):
    """Put `flaws` random flaws into the lines of an answer, one after the other. Ends go wrong the most."""
    lines = dict(lines)
    for _ in range(flaws):
        name = rng.choice([*lines])
        end, way = lines[name]
        kind = rng.choice(["end", "end", "end", "short", "other", "forget"])
        if kind == "end":
            lines[name] = (rng.choice(LOOKS), way)
        elif kind == "short" and len(way) > 1:
            lines[name] = (end, way[:-1])
        elif kind == "other":
            at = rng.randrange(len(way))
            lines[name] = (end, [*way[:at], rng.choice(LOOKS), *way[at + 1 :]])
        elif kind == "forget" and len(lines) > 1:
            del lines[name]
    return lines


def synthetic_pairs(n, seed):
    """n pairs: a chosen answer with few flaws, and a rejected one with more put into it.

    The chosen one meets at least one requirement more. That the two are versions of one text, as drafts are, is what lets
    M_PIT^SFT see that improving means keeping most of y_ref.
    """
    rng, pairs = random.Random(seed), []
    while len(pairs) < n:
        people = draw_people(rng)
        good = spoil(solve(people), rng.randint(0, 2), rng)
        prompt, better, worse = ask(people), tell(good), tell(spoil(good, rng.randint(1, 4), rng))
        if quality(prompt, better) > quality(prompt, worse):
            pairs.append(Pair([{"role": "user", "content": prompt}], better, worse))
    return pairs


# ---------------------------------------------------------------------------------------------------------------------
# Pairs, from anywhere
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    prompt: list  # chat messages, the last one by the user
    chosen: str  # y_w
    rejected: str  # y_l


def load_pairs(source, n, seed):
    """At most n pairs from "synthetic" or from a file. Raises UserError with file and line for what is not a pair."""
    if source == "synthetic":
        return synthetic_pairs(n, seed)
    path = Path(source)
    if not path.is_file():
        raise UserError(f"--data {source}: there is no such file. Give a .jsonl file, or: synthetic")
    pairs = []
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip() and len(pairs) < n:
                pairs.append(read_pair(line, f"{path}, line {number}"))
    return pairs


def read_pair(line, where):
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        raise UserError(f"{where}: this is not a JSON object.") from None
    for field in ("prompt", "chosen", "rejected"):
        if not isinstance(row, dict) or not row.get(field):
            raise UserError(f"{where}: there is no `{field}`.")
    if not isinstance(row["chosen"], str) or not isinstance(row["rejected"], str):
        raise UserError(f"{where}: `chosen` and `rejected` must be text.")
    prompt = row["prompt"] if isinstance(row["prompt"], list) else dialogue(row["prompt"])
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt):
        raise UserError(f"{where}: `prompt` must be text, or a list of messages with `role` and `content`.")
    return Pair(prompt, row["chosen"].strip(), row["rejected"].strip())


def dialogue(text):
    """Text -> chat messages: the turns of Anthropic's "\\n\\nHuman: ... \\n\\nAssistant:" form, or one user message."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    if len(parts) == 1:
        return [{"role": "user", "content": text.strip()}]
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]
    return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns


PARTS = {"held_out": 0.10, "judge": 0.15, "sft": 0.25, "rm": 0.25, "rl": 0.25}  # equal thirds, after the parts that judge


def split(pairs, seed):
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
            raise UserError(f"{len(pairs)} pairs are too few: the part {name!r} would get {len(parts[name])}, and needs 8.")
    return parts


# ---------------------------------------------------------------------------------------------------------------------
# Templates
# ---------------------------------------------------------------------------------------------------------------------


def improve_prompt(prompt, reference):
    """(x, y_ref) as chat messages. R_PIT(x, y, y_ref) reads the same turns and then y: it scores the very tokens of M_PIT."""
    return [*prompt, {"role": "assistant", "content": reference}, {"role": "user", "content": IMPROVE}]
