"""Your own task on a real base model: plain-English instructions, and a rule that checks answers.

    Write about a pet shop. Use the words fish and cage. Begin with "Title:" and your last word. ...

Of two drafts, the one that meets more requirements is preferred. No stage calls `quality`.
docs/results.md has a run, with its options.

    python -m examples.instructions SmolLM2-135M-Instruct task
    python pit.py all --model SmolLM2-135M-Instruct --data task/pairs.jsonl --run runs/mine
    python pit.py eval --run runs/mine --judge examples/instructions.py
"""

import json
import random
import re
from pathlib import Path

import torch
import typer
from tqdm import trange

from data import talk
from examples.drafts import OPENERS, PARTS, garble, revise, tell, words_of
from models import load_model

# One line per topic, with words that a text about it can use: "a rainy day: umbrella tea window".
TOPICS = dict(re.findall("(.+): (.+)", Path(__file__).with_name("topics.txt").read_text()))


# ---- What a prompt may ask for, and whether a text does it
REQUIREMENTS = {
    r"Use the words (\w+) and": lambda text, words, word: word in words,
    r"Use the words \w+ and (\w+)": lambda text, words, word: word in words,
    r"Avoid the word (\w+)": lambda text, words, word: word not in words,
    r"Begin with the word (\w+)": lambda text, words, word: words[0] == word.lower(),
    r"Begin with .Title:. and": lambda text, words: text.startswith(f"Title: {words[-1]}\n"),
    r"End with an exclamation": lambda text, words: text.endswith("!"),
    r"End with three dots": lambda text, words: text.endswith("..."),
    r"Write exactly (\d)": lambda text, words, n: re.fullmatch("[^.!?]+[.!?]+" * int(n), text),
    r"Use at most (\d+)": lambda text, words, n: len(words) <= int(n),
    r"Use at least (\d+)": lambda text, words, n: len(words) >= int(n),
}


def quality(prompt, answer):
    """The share of the prompt's requirements that the answer meets, in [0, 1].

    A title is the last word, in lower case, alone on the first line. It counts as text: it may
    be one of the words to use, or to avoid.
    """
    words = words_of(answer)
    met = []
    for wording, check in REQUIREMENTS.items():
        if stated := re.search(wording, prompt):
            # three words or fewer avoid nearly every word, but are no answer
            met.append(len(words) > 3 and bool(check(answer.strip(), words, *stated.groups())))
    return sum(met) / len(met)


def draw_prompt(rng):
    """A topic and five requirements: two words, how to begin, and two of four other kinds."""
    topic = rng.choice([*TOPICS])
    one, other = rng.sample(TOPICS[topic].split(), 2)
    count = rng.randint(2, 3)
    # A title comes first, but depends on the whole text: hard to plan, easy to add.
    first = rng.choice(['"Title:" and your last word'] * 3 + [f"the word {rng.choice(OPENERS)}"])
    kinds = [
        f"Avoid the word {rng.choice(['the', 'and', 'my', 'was'])}.",
        f"End with {rng.choice(['an exclamation mark', 'three dots'])}.",
        f"Write exactly {count} sentences.",
        rng.choice([f"Use at most {8 * count} words.", f"Use at least {7 * count} words."]),
    ]
    stated = f"Write about {topic}. Use the words {one} and {other}. Begin with {first}. "
    return stated + " ".join(rng.sample(kinds, 2)), topic


# ---- The base writes. Before it does, it sees four answers of the kind that we want.
def writer_prompt(topic, word):
    task = "Tell what happened, in one short sentence with the word."
    zoo = "a zoo: bear", "The bear slept behind a big rock."
    play = "a school play: costume", "Mother sewed a costume for my brother."
    wedding = "a wedding: cake", "They cut the cake with a sword."
    river = "a river: boat", "Our boat drifted slowly to the bridge."
    first = [{"role": "system", "content": task}, {"role": "user", "content": zoo[0]}]
    return talk(first, zoo[1], *play, *wedding, *river, f"{topic}: {word}")


def write_sentences(model, path, batch=64):
    """Eight sentences for each word of each topic, one per line of the file."""
    lm = load_model(model, bits=16)
    jobs = [(topic, word) for topic in TOPICS for word in TOPICS[topic].split() * 8]
    path.touch()
    # whole lines of whole batches: a kill may have cut the last one off
    lines = re.findall(".*\n", path.read_text())
    lines = lines[: len(lines) // batch * batch]
    path.write_text("".join(lines))
    for start in trange(len(lines), len(jobs), batch):
        prompts = [lm.encode_prompt(writer_prompt(*job)) for job in jobs[start : start + batch]]
        torch.manual_seed(start)
        texts = lm.decode(lm.generate("blank", prompts, 22, temperature=0.7).responses)
        with open(path, "a") as file:
            for (topic, _), text in zip(jobs[start:], texts):
                print(json.dumps([topic, text]), file=file)


def fluent_sentences(path):
    """{topic: sentences}: the first of each text, if short, on topic, and with a new last word.

    The last word has more than three letters, and no such word comes twice in the sentence.
    """
    pools = {topic: {} for topic in TOPICS}
    for line in path.read_text().splitlines():
        topic, text = json.loads(line)
        found = re.match(r"[A-Z][A-Za-z', -]*\.", text)
        words = words_of(found[0]) if found else []
        long = [word for word in words if len(word) > 3]
        fits = 4 <= len(words) <= 12 and long[-1:] == words[-1:] and len(long) == len(set(long))
        if fits and set(words) & set(TOPICS[topic].split()):
            pools[topic].setdefault(words[-1], found[0])
    return {topic: [*sentences.values()] for topic, sentences in pools.items()}


# ---- Pairs of drafts
def draw_pair(prompt, pool, rng):
    """A better and a worse text: the worse one is the better one with flaws, mostly just one.

    PIT mostly changes one word, and a reward model that has seen no such pair cannot judge that.
    If marks differed only where one is asked for, it would learn that they always matter. So
    where any mark will do, those of the two texts mostly differ.
    """

    def good(text):
        return quality(prompt, text)

    def bad(text):
        return -quality(prompt, text)

    draft = {part: rng.choice(values) for part, values in PARTS.items()}
    draft |= {"sentences": rng.sample(pool, rng.randint(1, 3))}
    better = revise(draft, good, pool, rng.randint(3, 8), rng)
    worse = revise(better, bad, pool, rng.choice([1, 1, 1, 1, 2, 3]), rng)
    other = worse | {"mark": rng.choice(PARTS["mark"])}
    if good(tell(other)) == good(tell(worse)):
        worse = other
    # In one pair in ten, what no reader would prefer: a sentence twice, or words out of order.
    spoil = rng.random()
    if spoil < 0.05:
        worse = worse | {"sentences": [*worse["sentences"], rng.choice(worse["sentences"])]}
    text = tell(worse)
    if 0.05 <= spoil < 0.1:
        text = garble(text, rng)
    return tell(better), text


def draw_rows(pools, pairs, prompts, rng):
    """Rows with a prompt, a chosen and a rejected answer, and rows with a prompt in no pair."""
    fresh = dict.fromkeys(draw_prompt(rng)[0] for _ in range(prompts))
    rows, drawn, lead = [], set(fresh), 0
    while len(rows) < pairs:
        prompt, topic = draw_prompt(rng)
        better, worse = draw_pair(prompt, pools[topic], rng)
        is_better = quality(prompt, better) > quality(prompt, worse)
        # Length must say nothing: while longer texts have won more often, skip pairs that a longer
        # one wins; while shorter ones have, those that a shorter one wins.
        extra = len(words_of(better)) - len(words_of(worse))
        if is_better and extra * lead <= 0 and prompt not in drawn:
            drawn.add(prompt)
            rows.append({"prompt": prompt, "chosen": better, "rejected": worse})
            lead += (extra > 0) - (extra < 0)
    return rows, [{"prompt": prompt} for prompt in fresh]


def main(model: str, out: Path, pairs: int = 6000, prompts: int = 400, seed: int = 0):
    """Make OUT/pairs.jsonl and OUT/prompts.jsonl: 15 minutes on one core; rerun to continue.

    OUT is for one base. Another number of prompts, or another seed, also gives other pairs.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_sentences(model, out / "sentences.jsonl")
    pools = fluent_sentences(out / "sentences.jsonl")
    if few := [topic for topic, pool in pools.items() if len(pool) < 3]:
        raise typer.BadParameter(f"{model} wrote too few usable sentences about {few[0]}.")
    rows, fresh = draw_rows(pools, pairs, prompts, random.Random(seed))
    for name, lines in ("pairs", rows), ("prompts", fresh):
        (out / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


if __name__ == "__main__":
    typer.run(main)
