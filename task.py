"""The built-in task: where does each person look in the end? With an exact quality of answers.

  prompt    Where does each look in the end? Ann north: left left back. Ben west: right left right.
  perfect   Now Ann north: west south north. Ben north: north west north.
  flawed    Now Ann east: west south north. Ben north: north west.

Ann starts by looking north. She turns left, left and back, so she looks west, south, and north in
the end. The flawed answer gets Ann's end wrong, and Ben's way is too short.

Why this task has room for self-improvement: a line says where somebody looks in the end *before*
the way there. The way is easy, one turn at a time. The end, said first, needs all the turns at
once, so a small model guesses. A draft spells out the way, whose last word is the end: what was
hard to say at first is easy to fix.

`quality` decides which answer of a pair is the better one (data.synthetic_pairs), and judges
answers (judges.py). No stage of training sees it.
"""

import re

NAMES = (
    "Ada Amy Ann Ben Bob Dan Eli Eva Fay Gus Ian Ida Jan Jim Joe Kay Lea Leo Max May Mia Ned Pam "
    "Ray Ron Roy Sam Sue Tim Tom Una Zoe"
).split()
LOOKS = "north east south west".split()  # clockwise
TURNS = {"right": 1, "back": 2, "left": 3}  # in quarters, clockwise
FLAWS = ("end", "end", "end", "turn", "short", "forget")  # ends go wrong most often


# ---- the language ------------------------------------------------------------------------------


def ask(people):
    """The prompt about `people`: {name: (first look, turns)}."""
    return tell(people, begin="Where does each look in the end?")


def tell(lines, begin="Now"):
    """The answer with these `lines`: {name: (end, way)}; way: where they look after each turn."""
    sentences = [f"{name} {look}: {' '.join(words)}." for name, (look, words) in lines.items()]
    return " ".join([begin, *sentences])


def read(text):
    """The lines of a prompt or an answer, as `ask` or `tell` got them; skips what is not a line."""
    found = re.findall(r"(\w+) (\w+): ([\w ]+)\.", text)
    return {name: (look, words.split()) for name, look, words in found}


# ---- what is right -----------------------------------------------------------------------------


def solve(people):
    """The lines of the perfect answer about `people`."""
    lines = {}
    for name, (look, turns) in people.items():
        way = []
        for turn in turns:
            look = LOOKS[(LOOKS.index(look) + TURNS[turn]) % 4]
            way.append(look)
        lines[name] = (look, way)
    return lines


def quality(prompt, answer):
    """The share of the prompt's requirements that the answer meets, in [0, 1]. For judging only.

    With n people there are 2n + 1 requirements: the right end and the right way for each, and
    nothing else in the answer.
    """
    perfect = solve(read(prompt))
    told = read(answer)
    # one requirement: nothing that was not asked for
    is_clean = bool(told) and told.keys() <= perfect.keys() and answer == tell(told)
    met = int(is_clean)
    # two per person
    for name, (end, way) in perfect.items():
        told_end, told_way = told.get(name, ("", []))
        met += int(told_end == end) + int(told_way == way)
    return met / (2 * len(perfect) + 1)


# ---- drawing questions and flaws ---------------------------------------------------------------


def draw_people(rng):
    """Three people, who turn three or four times each."""
    people = {}
    for name in rng.sample(NAMES, 3):
        start = rng.choice(LOOKS)
        people[name] = (start, [rng.choice(list(TURNS)) for _ in range(rng.randint(3, 4))])
    return people


def spoil(lines, flaws, rng, kinds=FLAWS):
    """Put up to `flaws` random flaws into the lines of an answer, one at a time."""
    lines = dict(lines)
    for _ in range(flaws):
        name = rng.choice(list(lines))
        kind = rng.choice(kinds)
        wrong = rng.choice(LOOKS)
        end, way = lines[name]
        at = rng.randrange(len(way))
        # sometimes the wrong look is the right one, and nothing changes
        if kind == "end":
            end = wrong
        elif kind == "turn":
            way = list(way)
            way[at] = wrong
        elif kind == "short" and len(way) > 1:
            way = way[:-1]
        lines[name] = (end, way)
        if kind == "forget" and len(lines) > 1:
            del lines[name]
    return lines
