"""Preference pairs: made or loaded, filtered by length, dealt out; and how (x, y_ref) becomes a prompt.

A *pair* is (prompt, chosen, rejected): a list of chat messages, the better answer, the worse answer. It is all that PIT
ever learns from: nobody writes down *why* one answer is better.

This file knows nothing of models.
"""

import hashlib
import json
import random
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import task
from errors import UserError
from files import BadRow, read_row, rows_of_file, rows_of_hub

IMPROVE = "Please improve your answer."  # our wording, the paper's is not known: a natural turn, without any rubric in words
PARTS = {
    "held_out": 0.10,
    "judge": 0.15,
    "sft": 0.25,
    "rm": 0.25,
    "rl": 0.25,
}  # equal thirds, after the parts that judge


def improve_prompt(prompt, reference):
    """(x, y_ref) as chat messages. M_PIT writes y after them, and R_PIT(x, y, y_ref) scores the very same tokens."""
    return [
        *prompt,
        {"role": "assistant", "content": reference},
        {"role": "user", "content": IMPROVE},
    ]


def max_length(cfg):
    """Tokens of the longest sequence in training: x, y_ref, "Please improve your answer.", y."""
    return (
        cfg.max_prompt + 2 * cfg.max_response + 16
    )  # the words of IMPROVE, and the template's tokens around its turn


@dataclass(frozen=True)
class Pair:
    prompt: list  # chat messages, the last one by the user
    chosen: str  # y_w
    rejected: str  # y_l

    def key(self):
        return json.dumps([self.prompt, self.chosen, self.rejected])


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
                raise UserError(
                    f"{source}, {place}: {error}. To go on without such rows: --skip-bad"
                ) from None
            columns, pair = "another form", "not a pair"
        notes[f"rows of {columns}"] += 1
        if isinstance(pair, str):
            notes[f"dropped ({pair})"] += 1
        elif kept.setdefault((pair := Pair(*pair)).key(), pair) is not pair:
            notes["dropped (seen before)"] += 1
    if not kept:
        raise UserError(
            f"--data {source} holds no pair to learn from: {describe(notes) or 'it is empty'}."
        )
    pairs = list(kept.values())
    if len(pairs) > n:
        notes["left out (more than --pairs)"] = len(pairs) - n
        pairs = random.Random(seed).sample(pairs, n)
    return pairs, notes


def describe(notes):
    return ", ".join(f"{number:,} {what}" for what, number in notes.items() if number)


def filter_by_length(pairs, count_prompt, count_answer, max_prompt, max_response, notes):
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
    starts = [
        (i, 0) for i, turn in enumerate(prompt) if turn["role"] == "user"
    ]  # (turn, character)
    starts += [
        (len(prompt) - 1, space.end()) for space in re.finditer(r"\s+", prompt[-1]["content"])
    ]

    def from_start(start):
        turn, character = start
        return [
            *system,
            prompt[turn] | {"content": prompt[turn]["content"][character:]},
            *prompt[turn + 1 :],
        ]

    first = bisect_left(starts, True, key=lambda start: count(from_start(start)) <= longest)
    return from_start(starts[first]) if first < len(starts) else None


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
            raise UserError(
                f"{few}, and needs 8." + (f"\nThe data: {describe(notes)}" if notes else "")
            )
    return parts


def load_parts(cfg, lm, pairs, notes):
    """The pairs that fit the run's lengths, dealt out -> {part: [Pair]}; prints what was kept and what was not."""
    pairs = filter_by_length(
        pairs,
        lambda turns: len(lm.encode_prompt(turns)),
        lambda text: len(lm.encode_response(text)),
        cfg.max_prompt,
        cfg.max_response,
        notes,
    )
    print(
        f"{cfg.data}: {', '.join(filter(None, [describe(notes), f'{len(pairs):,} pairs kept']))}",
        end="; ",
    )
    parts = split(pairs, cfg.seed)
    print(", ".join(f"{name} {len(part):,}" for name, part in parts.items()))
    return parts


def fingerprint(pairs):
    """A hash of the pairs, by which a run knows that its data is still the same."""
    return hashlib.sha256(json.dumps([vars(pair) for pair in pairs]).encode()).hexdigest()
