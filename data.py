"""Preference pairs: where they come from, how they are split, and how they become text.

A *pair* is (prompt, chosen, rejected): a list of chat messages, the better answer, the worse answer. It is all that PIT
ever learns from: nobody writes down *why* one answer is better.

Two sources:
  synthetic       the built-in task, "write a list" (below): made on the spot, with an exact quality function
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
from dataclasses import dataclass, replace
from pathlib import Path

from run import UserError

IMPROVE = "Please improve your answer."  # our own wording; the paper's is open

# ---------------------------------------------------------------------------------------------------------------------
# The synthetic task: write somebody a packing list, in order of the alphabet
# ---------------------------------------------------------------------------------------------------------------------
#
#   prompt    Write a list for Mia in order of the alphabet: tent, soap, apple, map and book. Start with Hello and end
#             with Have fun.
#   perfect   Hello Mia: apple, book, map, soap, tent. Have fun!
#   flawed    Hello Mia: apple, map, book, soap, hat. Have fun!          (order; the tent forgotten; a hat nobody asked for)
#
# Why this task shows self-improvement. Writing the list in one pass means sorting while writing: each step must look for
# the next word among all the others, and a slip cannot be taken back. A draft in view is nearly sorted already: it is
# enough to copy it and to mend what stands out. The same asymmetry makes people better at editing than at drafting.

NAMES = "Adam Anna Ben Ella Eva Finn Fred Hugo Ida Jane Karl Lena Leo Lily Max Mia Nora Otto Paul Rosa Ruth Sam Tom Zoe".split()
THINGS = (
    "apple bag ball bread camera candle cup drum egg film fork game glove hat honey ink jam juice key knife lamp lemon "
    "map milk nut oil pan pen phone radio rice rope salt soap sugar tea tent towel umbrella violin water yarn".split()
)  # in order of the alphabet
GREETINGS = "Dear Hello Hey Hi".split()
CLOSINGS = ["Bye for now", "Good luck", "Have fun", "See you soon", "Take care", "With love"]


@dataclass(frozen=True)
class Note:
    """What a prompt asks for, or what an answer says. `things` stand in the order in which they are written."""

    greeting: str
    name: str
    things: tuple
    closing: str

    def in_order(self):
        return replace(self, things=tuple(sorted(self.things)))


def ask(note):
    """The prompt that asks for `note`."""
    return (
        f"Write a list for {note.name} in order of the alphabet: {', '.join(note.things[:-1])} and {note.things[-1]}. "
        f"Start with {note.greeting} and end with {note.closing}."
    )


def tell(note):
    """The answer that says `note`."""
    return f"{note.greeting} {note.name}: {', '.join(note.things)}. {note.closing}!"


def parse(text):
    """The Note in a prompt or in an answer. Where the form is broken, a part that cannot be found is empty."""
    prompt = re.search(r"list for (\w+) in order of the alphabet: ([\w, ]+)\. Start with (\w+) and end with ([\w ]+)\.", text)
    if prompt:
        return Note(prompt[3], prompt[1], tuple(re.split(r", | and ", prompt[2])), prompt[4])
    answer = re.fullmatch(r"(\w*) ?(\w*): ([^.]*)\. ([\w ]+)!", text.strip())
    if answer:
        return Note(answer[1], answer[2], tuple(answer[3].split(", ")), answer[4])
    return Note("", "", tuple(re.findall(r"\w+", text)), "")


def quality(prompt, answer):
    """The share of the prompt's requirements that the answer meets, in [0, 1]: exact, and for judging alone.

    With n things asked for there are 2n + 3 requirements: the right greeting, name and closing, each of the n things named
    once, nothing else named, and each of the n - 1 neighbours in the alphabet in the right order.
    """
    asked, told = parse(prompt), parse(answer)
    things = asked.in_order().things
    once = [told.things.count(thing) == 1 for thing in things]
    met = [asked.greeting == told.greeting, asked.name == told.name, asked.closing == told.closing, *once]
    met.append(bool(told.things) and set(told.things) <= set(things))
    for i in range(len(things) - 1):
        met.append(once[i] and once[i + 1] and told.things.index(things[i]) < told.things.index(things[i + 1]))
    return sum(met) / len(met)


def draw_note(rng):
    things = rng.sample(THINGS, rng.randint(5, 7))
    return Note(rng.choice(GREETINGS), rng.choice(NAMES), tuple(things), rng.choice(CLOSINGS))


def spoil(note, flaws, rng):
    """Put `flaws` random flaws into a note, one after the other."""
    for _ in range(flaws):
        things = list(note.things)
        i = rng.randrange(len(things))
        kind = rng.choice(["swap", "swap", "move", "forget", "repeat", "other", "add", "add", "frame"])
        if kind == "swap":
            things[i - 1], things[i] = things[i], things[i - 1]
        elif kind == "move":
            things.insert(rng.randrange(len(things)), things.pop(i))
        elif kind == "forget" and len(things) > 2:
            del things[i]
        elif kind == "repeat":
            things[i] = rng.choice(things)
        elif kind == "add":
            things.insert(i, rng.choice(THINGS))
        elif kind == "other":
            things[i] = rng.choice(THINGS)
        elif kind == "frame":
            part, words = rng.choice([("greeting", GREETINGS), ("name", NAMES), ("closing", CLOSINGS)])
            note = replace(note, **{part: rng.choice(words)})
        note = replace(note, things=tuple(things))
    return note


def synthetic_pairs(n, seed):
    """n pairs: a chosen answer with few flaws, and a rejected one with more put into it.

    The chosen one meets clearly more requirements: a fifth of all, or more. That the two are versions of one text, as drafts
    are, is what lets M_PIT^SFT see that improving means keeping most of y_ref.
    """
    rng, pairs = random.Random(seed), []
    while len(pairs) < n:
        note = draw_note(rng)
        prompt = ask(note)
        good = spoil(note.in_order(), rng.randint(0, 3), rng)
        better, worse = tell(good), tell(spoil(good, rng.randint(2, 5), rng))
        if quality(prompt, better) - quality(prompt, worse) >= 0.2:
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
