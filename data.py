"""Preference pairs: made or loaded, filtered by length, split; and how (x, y_ref) becomes a prompt.

A *pair* is (prompt, chosen, rejected): chat messages, the better and the worse answer.
PIT learns from nothing else: nobody writes down *why* one answer is better.

A model is needed here only to count tokens.
"""

import hashlib
import json
import random
import re
from bisect import bisect_left
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import task
from errors import UserError
from files import (
    FORMS,
    BadRow,
    TeachesNothing,
    find_form,
    form_of_columns,
    read_columns,
    read_pair,
    rows_of,
)

# The paper does not give its wording. Ours is a plain request, which says nothing about what to
# improve.
IMPROVE = "Please improve your answer."
IMPROVE_TOKENS = 16  # that, and the template around it, in Qwen2; 8 in the built-in base
# Equal thirds for the stages, after what is set aside for judging.
PARTS = {"held_out": 0.10, "judge": 0.15, "sft": 0.25, "rm": 0.25, "rl": 0.25}


def talk(prompt, *texts):
    """A chat that goes on after its prompt: assistant, user, assistant, ..."""
    chat = list(prompt)
    for k, text in enumerate(texts):
        chat.append({"role": "user" if k % 2 else "assistant", "content": text})
    return chat


def improve_prompt(prompt, reference):
    """(x, y_ref) as chat messages: M_PIT continues them, and R_PIT(x, y, y_ref) scores them."""
    return talk(prompt, reference, IMPROVE)


def max_length(cfg):
    """Tokens of the longest sequence in training: x, y_ref, "Please improve your answer.", y."""
    return cfg.max_prompt + 2 * cfg.max_response + IMPROVE_TOKENS


@dataclass(frozen=True)
class Pair:
    prompt: list  # chat messages, the last one by the user
    chosen: str  # y_w
    rejected: str  # y_l
    given: str | None = None  # an answer by any other model, a y_ref for `--rounds given`

    def key(self):
        return json.dumps([self.prompt, self.chosen, self.rejected])

    def row(self):
        """Its columns, without an empty `given`."""
        return {name: value for name, value in vars(self).items() if value is not None}


def synthetic_pairs(n, seed):
    """n pairs of the built-in task: an answer with few flaws, and a copy with more put in.

    The chosen one meets at least one more requirement. The two are versions of one text, as drafts
    are: so M_PIT^SFT sees that improving an answer means keeping most of it.
    """
    rng = random.Random(seed)
    pairs = []
    while len(pairs) < n:
        people = task.draw_people(rng)
        good = task.spoil(task.solve(people), rng.randint(0, 2), rng, kinds=("end", "end", "short"))
        better = task.tell(good)
        worse = task.tell(task.spoil(good, rng.randint(1, 4), rng))
        prompt = task.ask(people)
        if task.quality(prompt, better) > task.quality(prompt, worse):
            pairs.append(Pair([{"role": "user", "content": prompt}], better, worse))
    return pairs


def load_pairs(source, n, seed, skip_bad=False, columns=""):
    """At most n pairs of "synthetic", a file, a folder or a hub data set; prints what was read.

    If there are more, the seed picks n: many data sets are ordered by topic.
    """
    if source == "synthetic":
        return synthetic_pairs(n, seed)
    pairs, notes = read_pairs(source, skip_bad, columns)
    if len(pairs) > n:
        notes["left out (more than --pairs)"] = len(pairs) - n
        pairs = random.Random(seed).sample(pairs, n)
    print(f"{source}: {in_words(notes) or 'it is empty'}")
    if not pairs:
        raise UserError(f"--data {source} holds no pair to learn from.")
    return pairs


def read_pairs(source, skip_bad=False, columns=""):
    """All pairs of a source, and counts of what was read and dropped.

    A row that teaches nothing (equal or empty answers, seen before) is dropped and counted. A row
    that is not a pair is an error; with skip_bad, only if no row is a pair. Prints the names of
    columns that nobody reads.
    """
    forms = [form_of_columns(columns)] if columns else FORMS
    notes = Counter()
    kept = {}
    unread = set()
    bad = None
    for place, row in rows_of(source):
        # from a row to a pair, and why not
        try:
            row = read_columns(row)
            form = find_form(row, forms)
            notes[f"read as {form}"] += 1
            unread |= row.keys() - form.reads()
            pair = Pair(*read_pair(row, form))
            if pair.key() in kept:
                raise TeachesNothing("seen before")
            kept[pair.key()] = pair
        except TeachesNothing as reason:
            notes[f"dropped ({reason})"] += 1
        except BadRow as error:
            if not bad:  # the first one is told
                hint = f"The row: {str(row)[:90]}"
                if kept:
                    hint = "To go on without such rows: --skip-bad"
                bad = UserError(f"{source}, {place}: {error}.\n{hint}")
            if not skip_bad:
                raise bad from None
            notes["dropped (not a pair)"] += 1
    if bad and not kept:
        raise bad
    if unread:
        print(f"{source}: columns that are not read: {', '.join(sorted(unread))[:200]}")
    return list(kept.values()), notes


def in_words(notes):
    return ", ".join(f"{number:,} {what}" for what, number in notes.items() if number)


def filter_by_length(pairs, lm, cfg):
    """The pairs within --max-prompt and --max-response, and how each began before it was cut.

    Prints what was cut and dropped. A prompt loses its oldest turns, then the first words of its
    last one. An answer is never cut: truncated, it would teach the model not to stop; with an EOS
    added, to stop mid-sentence.
    """
    too_long = f"dropped (an answer over {cfg.max_response} tokens)"
    notes = Counter({too_long: 0})
    kept = []
    beginnings = []
    lengths = []
    for pair in pairs:
        # its answers, as they are; a given one counts where a round improves it
        answers = [pair.chosen, pair.rejected]
        if "given" in cfg.rounds:
            answers.append(pair.given)
        lengths.append(max(len(lm.encode_response(answer)) for answer in answers))
        if lengths[-1] > cfg.max_response:
            notes[too_long] += 1
            continue
        # its prompt, cut if need be
        prompt = shorten(pair.prompt, lm, cfg.max_prompt)
        if prompt is None:
            notes[f"dropped (a prompt that cannot be cut to {cfg.max_prompt} tokens)"] += 1
            continue
        if prompt != pair.prompt:
            notes[f"with a prompt cut to {cfg.max_prompt} tokens"] += 1
        kept.append(replace(pair, prompt=prompt))
        beginnings.append(beginning(pair.prompt))

    notes["kept"] = len(kept)
    print(f"{cfg.data}: {in_words(notes)}")
    if notes[too_long] > len(pairs) / 2:
        enough = sorted(lengths)[int(0.9 * len(pairs))]
        print(f"Most pairs have a longer answer: --max-response {enough} would keep 90% of them.")
    return kept, beginnings


def shorten(prompt, lm, longest):
    """The longest end of `prompt` within `longest` tokens, its system message kept; or None."""
    system = [turn for turn in prompt if turn["role"] == "system"]
    last = prompt[-1]

    def fits(shorter):
        return len(lm.encode_prompt(shorter)) <= longest

    # drop the oldest turns; what is left begins with a turn of the user
    for i, turn in enumerate(prompt):
        shorter = [*system, *prompt[i:]]
        if turn["role"] == "user" and fits(shorter):
            return shorter

    # then the first words of the last turn. Later starts fit better, so the first that fits is
    # found by bisection: `fits` is False up to it, and True from it on
    def from_character(start):
        return [*system, last | {"content": last["content"][start:]}]

    starts = [space.end() for space in re.finditer(r"\s+", last["content"])]
    first = bisect_left(starts, True, key=lambda start: fits(from_character(start)))
    return from_character(starts[first]) if first < len(starts) else None


def split(pairs, beginnings, seed):
    """Split the pairs, so that no beginning of a dialogue is in two parts -> {part: [Pair]}.

    The held-out part gets one pair of each dialogue. UserError where a part would get fewer than 8
    dialogues.

    Where two dialogues begin alike, one often goes on with the answer that was chosen in the other:
    that would leak it. The parts depend on neither the order of the pairs nor the machine.
    """
    # shuffle the beginnings, from an order that is always the same
    groups = defaultdict(list)
    for pair, turns in zip(pairs, beginnings):
        groups[json.dumps(turns)].append(pair)
    groups = [groups[key] for key in sorted(groups)]
    random.Random(seed).shuffle(groups)

    # each part takes the next share of them
    n = len(groups)
    parts = {}
    start = 0.0
    for name, share in PARTS.items():
        own = groups[round(start * n) : round((start + share) * n)]
        if name == "held_out":
            # one pair of each: answers to one prompt or dialogue are not independent evidence
            own = [group[:1] for group in own]
        parts[name] = [pair for group in own for pair in group]
        start += share
        if len(own) < 8:
            raise UserError(
                f"Too few pairs: {len(pairs)}, dialogues: {n}. The part {name} would get "
                f"{len(own)} of these, but needs 8.\n"
                "Give more --data, or raise --pairs, --max-prompt or --max-response."
            )
    return parts


def beginning(prompt):
    """The turns up to the user's first."""
    speakers = [turn["role"] for turn in prompt]
    return prompt[: speakers.index("user") + 1]


def load_parts(cfg, lm, pairs):
    """The pairs that fit the lengths of the run, split -> {part: [Pair]}."""
    parts = split(*filter_by_length(pairs, lm, cfg), cfg.seed)
    print(", ".join(f"{len(part):,} for {name}" for name, part in parts.items()))
    return parts


def fingerprint(pairs):
    """A hash of the pairs, by which a run knows that its data is still the same."""
    return hashlib.sha256(json.dumps([pair.row() for pair in pairs]).encode()).hexdigest()
