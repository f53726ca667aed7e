"""All sides of a comparison, sampled once: PIT and its rounds, Self-Refine, best-of-n, a second sample."""

import zlib
from dataclasses import dataclass
from itertools import cycle

import torch

from data import improve_prompt
from reward import rewards
from run import read_json, seed_all, write_json

# Self-Refine (arXiv 2303.17651) asks the policy itself, in words: once for feedback, once for the refined answer.
FEEDBACK = "What could be better in your answer? Name each flaw and say how to mend it. Do not write a new answer yet."
REFINE = "Now write your answer again with these flaws mended. Write nothing but the new answer."
FOLLOWS = 0.5  # Self-Refine applies where at least this share of the feedback is neither empty nor the answer once more
TEMPERATURES = (0.1, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5)  # of Fig. 3
ROUNDS = 5  # of Table 3


def talk(prompt, *texts):
    """A chat that goes on after its prompt, the assistant and the user by turns."""
    return [
        *prompt,
        *(
            {"role": role, "content": text}
            for role, text in zip(cycle(("assistant", "user")), texts)
        ),
    ]


def best_of_n(lm, prompts, candidates, cfg):
    """The candidate that R_P scores highest for each prompt; candidates: n lists of texts."""
    scores = torch.stack(
        [rewards(lm, "reward_policy", prompts, texts, cfg) for texts in candidates]
    )  # (n, N)
    return [candidates[best][i] for i, best in enumerate(scores.argmax(0).tolist())]


@dataclass(eq=False)  # hashable: a side that goes by several names is judged once
class Side:
    """One final answer to each of N prompts; tokens written on the way to it, each EOS included (N,); generations."""

    texts: list
    tokens: list
    generations: int


class Answers:
    """Texts are sampled once, and kept in runs/NAME/answers.json while their writer and what it reads stay the same."""

    def __init__(self, lm, run, prompts):
        self.lm, self.run, self.prompts, self.path = lm, run, prompts, run.path / "answers.json"
        self.kept = read_json(self.path)

    def write(self, name, role, chats, temperature=1.0, after=None):
        """Let `role` answer each chat -> Side; `after`: the side whose texts stand in the chats, and whose cost counts too."""
        cfg = self.run.config
        writer = zlib.crc32((self.run.adapter(role) / "adapter_model.safetensors").read_bytes())
        made_of = zlib.crc32(
            repr((writer, chats, temperature, cfg.max_response, cfg.seed)).encode()
        )
        if self.kept.get(name, {}).get("made_of") != made_of:
            print(f"\r  writing {name:30}", end="", flush=True)
            seed_all(cfg.seed, "answers", name)
            self.kept[name] = {
                "made_of": made_of,
                "texts": self.lm.answer(role, chats, cfg, temperature),
            }
            write_json(self.path, self.kept)
        texts = self.kept[name]["texts"]
        tokens = [len(self.lm.encode_response(text)) for text in texts]
        after = after or Side([], [0] * len(texts), 0)
        return Side(
            texts, [new + old for new, old in zip(tokens, after.tokens)], after.generations + 1
        )

    def improve(self, name, role, side, temperature=1.0):
        chats = [improve_prompt(x, y_ref) for x, y_ref in zip(self.prompts, side.texts)]
        return self.write(name, role, chats, temperature, side)

    def feedback(self, name, role, side, temperature=1.0):
        chats = [talk(x, y, FEEDBACK) for x, y in zip(self.prompts, side.texts)]
        return self.write(f"{name} feedback", role, chats, temperature, side)

    def self_refine(self, name, role, side, temperature=1.0):
        feedback = self.feedback(name, role, side, temperature)
        chats = [
            talk(x, y, FEEDBACK, said, REFINE)
            for x, y, said in zip(self.prompts, side.texts, feedback.texts)
        ]
        return self.write(name, role, chats, temperature, feedback)

    def best_of(self, sides):
        texts = best_of_n(self.lm, self.prompts, [side.texts for side in sides], self.run.config)
        return Side(
            texts,
            [sum(row) for row in zip(*(side.tokens for side in sides))],
            sum(side.generations for side in sides),
        )


def write_sides(answers, pairs, last):
    """All sides of Table 1, the temperatures (NAME@T) and the rounds (NAME#K) of PIT and Self-Refine, by name -> dict of Side.

    `last` is the adapter of PIT's last round. Where Self-Refine does not apply, its sides are missing; the second result says
    why, and is None otherwise.
    """
    sides = {"y_w": Side([pair.chosen for pair in pairs], [0] * len(pairs), 0)}
    sides["policy_sft"] = answers.write("policy_sft", "policy_sft", answers.prompts)
    samples = "original", "second_sample", "third_sample"
    sides |= {name: answers.write(name, "policy_rl", answers.prompts) for name in samples}
    original = sides["original"]
    sides |= {
        name: answers.improve(name, name, original)
        for name in ("pit_sft", "pit_rl0")
        if name != last
    }
    sides |= {
        f"best_of_{n}": answers.best_of([sides[name] for name in samples[:n]]) for n in (2, 3)
    }
    methods = {"pit": lambda name, side, T=1.0: answers.improve(name, last, side, T)}
    refusal = self_refine_refusal(answers, original)
    if refusal is None:
        methods["self_refine"] = lambda name, side, T=1.0: answers.self_refine(
            name, "policy_rl", side, T
        )
        sides["self_refine_sft"] = answers.self_refine("self_refine_sft", "policy_sft", original)
    for method, write_one in methods.items():
        side = sides[method] = sides[f"{method}@1.0"] = sides[f"{method}#1"] = write_one(
            method, original
        )
        sides |= {
            f"{method}@{T}": write_one(f"{method}@{T}", original, T)
            for T in TEMPERATURES
            if T != 1.0
        }
        for k in range(2, ROUNDS + 1):
            side = sides[f"{method}#{k}"] = write_one(f"{method}#{k}", side)
    return sides, refusal


def self_refine_refusal(answers, original):
    """Why Self-Refine does not apply to this model, in words, or None where it does."""
    if answers.run.config.model == "tiny":
        return "the built-in base cannot follow such prompts"
    texts = answers.feedback(
        "self_refine", "policy_rl", original
    ).texts  # kept, and used again by `self_refine`
    follows = sum(bool(text) and text != y for text, y in zip(texts, original.texts)) / len(texts)
    return (
        None
        if follows >= FOLLOWS
        else f"only {follows:.0%} of the policy's feedback says anything but the answer again"
    )
