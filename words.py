"""What did PIT learn? The words, endings and lengths that set its answers apart from the originals.

A reward model can fall for a single word, and PIT then learns to write that word everywhere. The
scores rise, and no table of scores shows why. So we count the words on both sides, find those that
PIT adds, and see whether the annotators' better answers have them too. Then the judge reads the
answers again with such a word deleted from both sides: what Delta loses is what that word won.
"""

import re
from collections import Counter
from functools import partial
from itertools import chain
from math import log, sqrt

from evaluate import compare

CLEAR = 2  # a smaller z may be chance; since the prior shrinks z, few words exceed it by chance
LINES = 10  # of each kind, at most


def words_of(text):
    return set(re.findall(r"\w+(?:'\w+)*", text.lower().replace("’", "'")))


def shape_of(text):
    """How a text ends, and how long it is."""
    mark = re.search(r"[^\w\s]*$", text.rstrip())[0] or "no mark"
    low = len(text.split()) // 10 * 10
    return [f"ends with {mark}", f"{low} to {low + 9} words"]


def log_odds(a, b, background):
    """Counts of two groups, and of all texts around them -> {feature: z}, above 0: a has more.

    z is the difference in log-odds, smoothed by an informative Dirichlet prior, divided by its
    standard error, as in Monroe, Colaresi and Quinn (2008), "Fightin' Words". The prior has the
    shares of the background, and as much weight as one group: it keeps rare words from coming
    first.
    """
    if len(background) < 2:
        return {}  # nothing to compare with
    weight = (a.total() + b.total()) / 2
    scale = weight / background.total()
    total_a = a.total() + weight
    total_b = b.total() + weight
    z = {}
    for feature in a | b:
        prior = scale * background[feature]
        in_a = a[feature] + prior
        in_b = b[feature] + prior
        difference = log(in_a / (total_a - in_a)) - log(in_b / (total_b - in_b))
        z[feature] = difference / sqrt(1 / in_a + 1 / in_b)
    return z


def standing_out(features, sides):
    """What sets PIT's answers apart: z, and how many texts of each side have it."""
    counts = {}
    for side, texts in sides.items():
        counts[side] = Counter(chain.from_iterable(map(features, texts)))
    z = log_odds(counts["pit"], counts["original"], sum(counts.values(), Counter()))
    rows = []
    for feature in sorted(z, key=z.get, reverse=True)[:LINES]:
        if z[feature] > CLEAR:
            texts = {side: count[feature] for side, count in counts.items()}
            rows.append({"feature": feature, "z": z[feature], "texts": texts})
    return rows


def without(word, text):
    """The text with every `word` deleted, and a comma or space that would then begin it."""
    # The blanks before it go, too, but no line break. An apostrophe between letters is part of a
    # word, one at its end is a quotation mark.
    spelled = word.replace("'", "['’]")
    pattern = rf"[^\S\n]*(?<!\w)(?<!\w['’]){spelled}(?!['’]?\w)"
    rest = re.sub(pattern, "", text, flags=re.IGNORECASE)
    return text if rest == text else rest.lstrip(" ,")


def measure(lines, pairs, judge):
    """What sets PIT's answers apart from the originals -> results["words"].

    lines: of answers.jsonl; pairs: those of the training. A word also gets Delta with that word
    deleted from both sides.
    """
    prompts = [line["prompt"] for line in lines]
    sides = {
        "pit": [line["answers"]["pit"] for line in lines],
        "original": [line["answers"]["original"] for line in lines],
        "y_w": [pair.chosen for pair in pairs],
        "y_l": [pair.rejected for pair in pairs],
    }

    def delta(edit):
        """PIT over the original, both edited."""
        scores = [judge.score(prompts, list(map(edit, sides[s]))) for s in ("pit", "original")]
        return compare(*scores, judge.margin)

    words = standing_out(words_of, sides)
    for row in words:
        row["without"] = delta(partial(without, row["feature"]))
    rows = words + standing_out(shape_of, sides)
    return {
        "answers": len(lines),
        "pairs": len(pairs),
        "delta": delta(lambda text: text),
        "rows": rows,
    }
