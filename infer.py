"""Using PIT: answer, improve, iterate, and the baselines that spend the same number of generations.

y_0 ~ M_P^RL(x)            y_{k+1} ~ M_PIT^RL(x, y_k)            gap_k = R_PIT(x, y_{k+1}, y_k), above 0 for "better"
"""

import torch

import reward
from data import improve_prompt
from models import in_parts


def answer(lm, role, prompts, cfg, temperature=1.0):
    """One answer by policy `role` to each prompt (lists of chat messages) -> texts."""
    return write(lm, role, [lm.encode_prompt(prompt) for prompt in prompts], cfg, temperature)


def improve(lm, role, prompts, references, cfg, temperature=1.0):
    """One improvement by PIT model `role` of each reference (texts) -> texts."""
    pairs = zip(prompts, references)
    return write(lm, role, [lm.encode_prompt(improve_prompt(x, y_ref)) for x, y_ref in pairs], cfg, temperature)


def write(lm, role, prompts, cfg, temperature):
    texts = []
    for start in range(0, len(prompts), cfg.rl_batch):
        batch = prompts[start : start + cfg.rl_batch]
        texts += lm.decode(lm.generate(role, batch, cfg.max_response, temperature).responses)
    return texts


def gaps(lm, prompts, answers, references, cfg):
    """How much better R_PIT holds each answer to be than its reference -> (N,) on the CPU; 0 means no change."""
    encoded = [lm.encode_prompt(improve_prompt(x, y_ref)) for x, y_ref in zip(prompts, references)]
    answers, references = ([lm.encode_response(text) for text in texts] for texts in (answers, references))
    return reward.gap(lm, encoded, answers, references, cfg.micro_batch).cpu()


def rewards(lm, role, prompts, answers, cfg):
    """R_P, or a judge by its role, of each answer -> (N,) on the CPU."""
    return score(lm, role, [lm.encode_prompt(x) for x in prompts], answers, cfg)


@torch.no_grad()
def score(lm, role, prompts, answers, cfg):
    lm.activate(role)
    tokens = lm.collate(prompts, [lm.encode_response(text) for text in answers])
    return in_parts(lambda part: lm.scores(role, part), tokens, cfg.micro_batch).cpu()


def best_of_n(lm, prompts, candidates, cfg):
    """The candidate that R_P scores highest for each prompt; candidates: n lists of texts."""
    scores = torch.stack([rewards(lm, "reward_policy", prompts, texts, cfg) for texts in candidates])  # (n, N)
    return [candidates[best][i] for i, best in enumerate(scores.argmax(0).tolist())]


def iterate(lm, policy, pit, prompt, cfg, rounds, temperature, response=None):
    """Yield (text, gap over the text before) for one prompt: first the policy's answer, or `response`, with gap None."""
    text = response if response is not None else answer(lm, policy, [prompt], cfg, temperature)[0]
    yield text, None
    for _ in range(rounds):
        better = improve(lm, pit, [prompt], [text], cfg, temperature)[0]
        yield better, gaps(lm, [prompt], [better], [text], cfg).item()
        text = better
