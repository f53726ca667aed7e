"""The built-in task: where does each look in the end? Questions, answers of any quality, and the exact judge of them.

  prompt    Where does each look in the end? Ann north: left left back. Ben west: right left right. Eva south: left back right.
  perfect   Now Ann north: west south north. Ben north: north west north. Eva north: east west north.
  flawed    Now Ann east: west south north. Ben north: north west. Eva north: east west north.       (Ann's end, Ben's way)

Why self-improvement has something to show here. A line says where somebody looks in the end before the way to it, as people
like to. The way is easy, one turn after the other. The end, said first, takes all the turns at once: a small model guesses.
In a draft the way can be read, and the end is its last word: what was hard to say at first is easy to put right.

`quality` says which answer of a pair is the better one (data.synthetic_pairs), and judges answers (evaluate.py); no stage of
training sees it.
"""

import re
from itertools import accumulate

NAMES = (
    "Ada Amy Ann Ben Bob Dan Eli Eva Fay Gus Ian Ida Jan Jim Joe Kay Lea Leo Max May Mia Ned Pam Ray Ron Roy Sam Sue Tim Tom "
    "Una Zoe".split()
)
LOOKS = "north east south west".split()  # clockwise
TURNS = {"right": 1, "back": 2, "left": 3}  # in quarters, clockwise


def ask(people):
    """The prompt about `people`: {name: (where he or she looks at first, turns)}."""
    return tell(people, begin="Where does each look in the end?")


def tell(lines, begin="Now"):
    """The answer that says `lines`: {name: (end, way)}, the way being where he or she looks after each turn."""
    return " ".join(
        [begin, *(f"{name} {look}: {' '.join(words)}." for name, (look, words) in lines.items())]
    )


def read(text):
    """The lines of a prompt or an answer, as `ask` or `tell` was given them. What has not the form of a line is not read."""
    return {
        name: (look, words.split())
        for name, look, words in re.findall(r"(\w+) (\w+): ([\w ]+)\.", text)
    }


def solve(people):
    """The lines of the perfect answer about `people`."""
    lines = {}
    for name, (start, turns) in people.items():
        quarters = accumulate((TURNS[turn] for turn in turns), initial=LOOKS.index(start))
        way = [LOOKS[quarter % 4] for quarter in quarters][1:]
        lines[name] = (way[-1], way)
    return lines


def quality(prompt, answer):
    """The share of the prompt's requirements that the answer meets, in [0, 1]: exact, and for judging alone.

    With n people there are 2n + 1: for each the right end and the right way, and nothing else besides.
    """
    perfect, told = solve(read(prompt)), read(answer)
    met = [bool(told) and set(told) <= set(perfect) and answer == tell(told)]
    for name, (end, way) in perfect.items():
        told_end, told_way = told.get(name, ("", []))
        met += [told_end == end, told_way == way]
    return sum(met) / len(met)


def draw_people(rng):
    """Three people, who turn three or four times each."""
    return {
        name: (rng.choice(LOOKS), [rng.choice([*TURNS]) for _ in range(rng.randint(3, 4))])
        for name in rng.sample(NAMES, 3)
    }


FLAWS = ("end", "end", "end", "turn", "short", "forget")  # ends go wrong the most


def spoil(lines, flaws, rng, kinds=FLAWS):
    """Put up to `flaws` random flaws into the lines of an answer, one after the other."""
    lines = dict(lines)
    for _ in range(flaws):
        name, kind, wrong = rng.choice([*lines]), rng.choice(kinds), rng.choice(LOOKS)
        end, way = lines[name]
        at = rng.randrange(len(way))
        if kind == "end":
            lines[name] = (wrong, way)
        elif kind == "turn":
            lines[name] = (end, [*way[:at], wrong, *way[at + 1 :]])
        elif kind == "short" and len(way) > 1:
            lines[name] = (end, way[:-1])
        elif kind == "forget" and len(lines) > 1:
            del lines[name]
    return lines
