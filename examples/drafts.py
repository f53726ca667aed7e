"""Drafts: texts made of parts, which a script can change one by one. Used by instructions.py.

A draft is a dict: its "sentences", and a value of PARTS for its "opening" and its "mark".
"""

import re

OPENERS = ["Today", "Sometimes", "Now", "Well"]
# A title is the last word, as it should be, or a wrong one: a number picks from the other
# sentences' last words and all long words.
TITLES = ["last word", *range(12)]
PARTS = {"opening": ["", *TITLES, *OPENERS], "mark": [".", "!", "..."]}


def words_of(text):
    """In lower case; an apostrophe is part of a word."""
    return re.findall(r"[\w']+", text.lower())


def tell(draft):
    """The text of a draft."""
    text = " ".join(draft["sentences"])[:-1] + draft["mark"]
    if draft["opening"] in TITLES:
        *others, last = [words_of(sentence)[-1] for sentence in draft["sentences"]]
        others += [word for word in words_of(text) if len(word) > 3]
        others = [word for word in others if word != last] or [last]
        right = draft["opening"] == "last word"
        return f"Title: {last if right else others[draft['opening'] % len(others)]}\n{text}"
    if draft["opening"]:
        start = "I" if re.match(r"I\b", text) else text[0].lower()
        text = f"{draft['opening']}, {start}{text[1:]}"
    return text


def change(draft, pool, rng):
    """Change one part at random, for better or worse, or replace, add or remove one sentence."""
    part = rng.choice(["sentences", *PARTS])
    if part != "sentences":
        return draft | {part: rng.choice(PARTS[part])}
    sentences = [*draft["sentences"]]
    at = rng.randrange(len(sentences))  # where one is replaced, put in, or taken out
    sentences[at : at + rng.randint(0, 1)] = rng.sample(pool, rng.randint(0, 1))
    allowed = 1 <= len(set(sentences)) == len(sentences) <= 3
    return draft | {"sentences": sentences} if allowed else draft


def revise(draft, score, pool, steps, rng):
    """Try 200 changes, and keep those that raise score(text), `steps` of them at most."""
    best = score(tell(draft))
    for _ in range(200):
        changed = change(draft, pool, rng)
        new = score(tell(changed))
        if steps and new > best:
            draft, best, steps = changed, new, steps - 1
    return draft


def garble(text, rng):
    """Move some of the words to the end."""
    words = text.split()
    start, end = sorted(rng.sample(range(len(words)), 2))
    return " ".join(words[:start] + words[end:] + words[start:end])
