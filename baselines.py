"""All sides of a comparison: PIT's rounds, Self-Refine, best-of-n, a second sample, given answers.

A side is one answer to each held-out prompt, by one method, at one temperature, after a number of
rounds. Its texts are sampled once, and kept in runs/NAME/answers.json until the adapter that wrote
them, or what it read, changes.
"""

import json
import zlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data import improve_prompt, talk
from reward import encode_written
from run import crc_of, read_json, seed_all, write_text

# Self-Refine (arXiv 2303.17651) asks the policy itself: for feedback, then for a new answer
FEEDBACK = (
    "What could be better in your answer? List each flaw and how to fix it. "
    "Do not write a new answer yet."
)
REFINE = "Rewrite your answer with these flaws fixed. Output only the new answer."
REFINERS = {"self_refine": "policy_rl", "self_refine_base": "blank"}  # the adapter of each
OF_PAIRS = {"y_w": "chosen", "y_l": "rejected", "given": "given"}  # texts that nobody has to write
SAMPLES = {  # answers to the prompt alone, and the adapter that writes them
    "policy_sft": "policy_sft",
    "original": "policy_rl",
    "second_sample": "policy_rl",
    "third_sample": "policy_rl",
}
BEST_OF = {  # what each chooses from
    "best_of_2": ["original", "second_sample"],
    "best_of_3": ["original", "second_sample", "third_sample"],
}
COOL_SIDES = ("original", "second_sample", "best_of_2", "pit_sft", "pit_rl0", "pit")
TEMPERATURES = (0.1, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5)  # of Fig. 3
ROUNDS = 5  # of Table 3
COOL = 0.4  # the temperature of `infer`


class Key(NamedTuple):
    """Which side: its method, by the name that Table 1 has for it, and how it was sampled."""

    method: str
    temperature: float = 1.0
    round: int = 1
    drafts: float = 1.0  # the temperature of the text that its first round improves

    def __str__(self):
        """The name of its texts in answers.json, which also seeds their sampling."""
        name = self.method
        if self.temperature != 1.0:
            name += f"@{self.temperature}"
        if self.drafts != 1.0:
            name += f", drafts@{self.drafts}"
        if self.round > 1:
            name += f"#{self.round}"
        return name

    def before(self):
        """The side that an improvement starts from: the round before, or the draft.

        A side that improves nothing is measured against the draft, too.
        """
        if self.round > 1:
            return self._replace(round=self.round - 1)
        if self.method == "pit_given":
            return Key("given")
        return Key("original", temperature=self.drafts, drafts=self.drafts)


ORIGINAL = Key("original")


def cool(method):
    """A side at the temperature of `infer`, like the draft that it starts from."""
    return Key(method, temperature=COOL, drafts=COOL)


def round_keys(method):
    """Table 3: the sides after one round of improvement, two, ..."""
    return [Key(method, round=k) for k in range(1, ROUNDS + 1)]


def all_keys(methods, last, sources=()):
    """Every side of the tables and figures, an improved text after the one that it improves.

    methods: those of Fig. 3 and Table 3. last: the adapter of PIT's last round. sources: who wrote
    y_ref in its rounds.
    """
    names = ["y_w", "y_l", *SAMPLES, *BEST_OF, "base", "pit_sft"]
    if last != "pit_rl0":  # after one round alone, that is PIT itself
        names.append("pit_rl0")
    if "given" in sources:  # answers by any other writer, and PIT's improvement of them
        names += ["given", "pit_given"]
    if "self_refine" in methods:
        names.append("self_refine_base")
    keys = [Key(name) for name in names]
    for method in methods:
        keys += round_keys(method)
        keys += [Key(method, temperature=T) for T in TEMPERATURES if T != 1.0]
    return keys + [cool(method) for method in COOL_SIDES if Key(method) in keys]


@dataclass
class Side:
    """One answer to each of N prompts, and what it took to write it."""

    texts: list
    written: list  # of (N,) arrays: the tokens of each text on the way to it, itself included

    @property
    def spent(self):
        """All tokens that were generated for it -> (N,), or 0 if none were."""
        return sum(self.written)


class Answers:
    """The sides of a run. When first asked for, each is read from answers.json, or written."""

    def __init__(self, lm, run, pairs, last=None, reward_policy=None):
        """last: the adapter of PIT's last round; reward_policy: R_P, as a Judge."""
        self.lm = lm
        self.run = run
        self.pairs = pairs
        self.last = last
        self.reward_policy = reward_policy
        self.prompts = [pair.prompt for pair in pairs]
        self.path = run.path / "answers.json"
        self.kept = read_json(self.path, "Delete it, then evaluate again.")
        self.sides = {}

    def side(self, key):
        """The side with this key -> Side."""
        if key not in self.sides:
            self.sides[key] = self.make(key)
        return self.sides[key]

    def make(self, key):
        """Take, write or choose the texts of a side -> Side."""
        method = key.method
        if method in OF_PAIRS:
            return Side([getattr(pair, OF_PAIRS[method]) for pair in self.pairs], written=[])
        if method in SAMPLES:
            return self.write(key, SAMPLES[method], self.prompts)
        if method in BEST_OF:
            return self.best_of(key)
        if method in REFINERS:
            return self.self_refine(key, REFINERS[method])
        # one improvement by PIT after its last round, by an earlier stage, or by the base itself
        role = {"pit": self.last, "pit_given": self.last, "base": "blank"}.get(method, method)
        return self.write(key, role, self.to_improve(key), self.before(key).written)

    def before(self, key):
        """The side that an improvement starts from -> Side."""
        return self.side(key.before())

    def to_improve(self, key):
        """What PIT reads before an improvement: each prompt, and the text that it starts from."""
        return list(map(improve_prompt, self.prompts, self.before(key).texts))

    def lengths(self, texts):
        """The tokens of each text, EOS included if it was written -> (N,)."""
        return np.array([len(encode_written(self.lm, text, self.run.config)) for text in texts])

    def write(self, key, role, chats, after=()):
        """One answer by `role` to each chat -> Side; `after`: tokens of the texts before it."""
        cfg = self.run.config
        name = str(key)
        # the texts stay the same while all that they depend on does
        file = self.run.adapter(role) / "adapter_model.safetensors"
        weights = b"" if role == "blank" else file.read_bytes()
        inputs = (zlib.crc32(weights), chats, key.temperature, cfg.max_response, cfg.seed)
        made_of = crc_of(inputs)
        if self.kept.get(name, {}).get("made_of") != made_of:
            seed_all(cfg.seed, "answers", name)
            texts = self.lm.answer(role, chats, cfg, key.temperature)
            self.kept[name] = {"made_of": made_of, "texts": texts}
            write_text(self.path, json.dumps(self.kept))
        texts = self.kept[name]["texts"]
        return Side(texts, [*after, self.lengths(texts)])

    def self_refine(self, key, role):
        """One improvement by `role` itself, after its own feedback -> Side."""
        before = self.before(key)
        # 1. the feedback
        chats = [talk(x, y, FEEDBACK) for x, y in zip(self.prompts, before.texts)]
        key_of_feedback = key._replace(method=f"{key.method} feedback")
        feedback = self.write(key_of_feedback, role, chats, before.written)
        # 2. the new answer
        chats = [talk(chat, said, REFINE) for chat, said in zip(chats, feedback.texts)]
        return self.write(key, role, chats, feedback.written)

    def best_of(self, key):
        """Of n samples to each prompt, the one that R_P scores highest -> Side."""
        samples = [self.side(key._replace(method=method)) for method in BEST_OF[key.method]]
        scores = [self.reward_policy.score(self.prompts, sample.texts) for sample in samples]
        best = np.argmax(scores, axis=0)  # (N,)
        texts = [samples[k].texts[i] for i, k in enumerate(best)]
        return Side(texts, [sample.spent for sample in samples])
