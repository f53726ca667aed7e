"""Who decides: an exact rule, an adapter of this run, a reward model from the hub."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import reward
from errors import UserError, first_line, out_of_memory
from task import quality

SAME = 1e-4  # exact scores closer than this are a tie
NEAR = 0.1  # learned scores are log-odds: closer than this is a tie, a preference of less than 52.5 to 47.5


@dataclass
class Judge:
    """score(prompts, texts) -> (N,) numbers, larger for better; closer than `margin` is a tie."""

    score: Callable
    margin: float = NEAR


def exact(prompts, texts):
    return np.array([quality(prompt[-1]["content"], text) for prompt, text in zip(prompts, texts)])


def adapter_judge(lm, role, cfg):
    """A Bradley-Terry judge: an adapter with a head on this base or another."""
    return Judge(lambda prompts, texts: reward.rewards(lm, role, prompts, texts, cfg).numpy())


def judges_by_name(names, lm, cfg):
    """Judges for the names of --judge, the main one first; without names, the exact quality if there is one, and the run's."""
    judges = {}
    for name in names or (["quality", "judge"] if cfg.data == "synthetic" else ["judge"]):
        if name == "judge":
            judges[name] = adapter_judge(lm, name, cfg)
        elif name != "quality":
            judges[name] = hub_judge(name, lm.device)
        elif cfg.data == "synthetic":
            judges[name] = Judge(exact, SAME)
        else:
            raise UserError(
                "--judge quality: only the synthetic task has an exact quality. Give judge, or a reward model."
            )
    return judges


def hub_judge(name, device):
    """A sequence-classification reward model, by hub id or folder; it reads its own chat template, or prompt and answer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        options = dict(use_safetensors=True, trust_remote_code=False)
        model = (
            AutoModelForSequenceClassification.from_pretrained(name, **options).to(device).eval()
        )
    except Exception as error:  # of many kinds
        if out_of_memory(error):
            raise
        reason = f"--judge {name}: {first_line(error)}"
        raise UserError(
            f"{reason}\nGive quality, judge, or a reward model by folder or hub id."
        ) from None
    if model.config.num_labels != 1:
        raise UserError(
            f"--judge {name}: a reward model has one output, this one has {model.config.num_labels}."
        )

    @torch.no_grad()
    def score(prompts, texts):
        scores = []
        for prompt, text in zip(
            prompts, texts
        ):  # one by one: not all such models know their padding
            if tokenizer.chat_template:
                chat = tokenizer.apply_chat_template(
                    [*prompt, {"role": "assistant", "content": text}], tokenize=False
                )
                inputs = tokenizer(chat, add_special_tokens=False, return_tensors="pt")
            else:
                inputs = tokenizer(
                    "\n\n".join(turn["content"] for turn in prompt), text, return_tensors="pt"
                )
            scores.append(model(**inputs.to(device)).logits.float().item())
        return np.array(scores)

    return Judge(score)
