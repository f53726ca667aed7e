"""Who decides: an exact rule, an adapter of this run, a function of yours, a hub reward model.

All of them score texts, and the higher score wins. People and language models, who compare two
texts instead, are in votes.py.

torch and the models are imported by the judges that need them, so a misspelt name fails at once.
"""

import re
import runpy
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from numbers import Real
from pathlib import Path

import numpy as np

import task
from data import talk
from errors import UserError, explained, first_line

SAME = 1e-4  # exact scores closer than this are a tie
# Scores of a Bradley-Terry model closer than this are a tie: sigmoid(0.1) is 52.5%. Models from the
# hub may have other units.
NEAR = 0.1
GAP_MODELS = {  # adapters that say how much better one answer is than another
    "reward_gap": "R_PIT, Eq. 2 centred",
    "reward_policy": "R_P(y) - R_P(y_ref)",
    "reward_gap2": "Eq. 2 as published",
    "reward_gap3": "Eq. 2, first three terms",
}
CHOICES = (
    "Give quality (built-in task only), judge, a FILE.py with a rule of yours, or a reward model: "
    "its folder, or its hub id, OWNER/NAME."
)


@dataclass
class Judge:
    """Scores answers, larger for better. Scores closer than `margin` are a tie."""

    ask: Callable  # (prompts, texts) -> one number each
    margin: float = NEAR
    known: dict = field(default_factory=dict)  # (prompt, text) -> its score

    def score(self, prompts, texts):
        """The score of each text after its prompt -> (N,). The same text is never scored twice."""
        keys = list(zip(map(str, prompts), texts))
        new = {key: prompt for key, prompt in zip(keys, prompts) if key not in self.known}
        if new:
            scores = self.ask(list(new.values()), [text for _, text in new])
            if not np.isfinite(scores).all():
                raise UserError("A judge gave a score that is not a finite number.")
            self.known.update(zip(new, scores))
        return np.array([self.known[key] for key in keys], dtype=float)


def default_judges(cfg):
    """The exact rule where there is one, and the run's own judge."""
    return ["quality", "judge"] if cfg.data == "synthetic" else ["judge"]


def judges_by_name(names, lm, cfg):
    """Judges for the names of --judge -> {name: Judge}, the main one first."""
    return {name: judge_named(name, lm, cfg) for name in names}


def judge_named(name, lm, cfg):
    """The Judge of one name of --judge. A new kind gets its line here and in `check_names`."""
    if name == "quality":  # the built-in task's rule, which no stage of training sees
        return function_judge(task.quality)
    if name == "judge":
        return adapter_judge(lm, name, cfg)
    return file_judge(name) if name.endswith(".py") else hub_judge(name, lm.device)


def check_names(names, cfg):
    """UserError for a name of --judge that no judge of a run can have; loads nothing."""
    for name in names:
        # on the hub, as far as its form goes
        on_hub = re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not name.endswith(".py")
        if not (name in default_judges(cfg) or on_hub or Path(name).exists()):
            raise UserError(f"--judge {name}: there is no such judge.\n{CHOICES}")


# ---- the kinds ---------------------------------------------------------------------------------


def function_judge(quality):
    """Scores by quality(prompt, answer), where `prompt` is the text of the user's last message."""

    def ask(prompts, texts):
        return [quality(prompt[-1]["content"], text) for prompt, text in zip(prompts, texts)]

    return Judge(ask, SAME)


def adapter_judge(lm, role, cfg):
    """A reward model of this run, by its role."""
    from reward import rewards

    return Judge(lambda prompts, texts: rewards(lm, role, prompts, texts, cfg).tolist())


def file_judge(path):
    """A Python file of the user's own, with a function quality(prompt, answer) -> float.

    See `function_judge` for what it is given. Its errors are shown with their line in the file.
    """
    sys.path.append(str(Path(path).resolve().parent))  # its own imports; ours come first
    with blaming(path):
        quality = runpy.run_path(path).get("quality")
    if not callable(quality):
        raise UserError(f"--judge {path}: the file has no function quality(prompt, answer).")

    def checked(prompt, answer):
        with blaming(path):
            value = quality(prompt, answer)
            is_number = isinstance(value, Real | np.bool_) and isfinite(value)
        if not is_number:
            raise UserError(
                f"--judge {path}: quality returned {value!r:.60} for the answer {answer!r:.60}; "
                "it must return one finite number."
            )
        return float(value)

    return function_judge(checked)


@contextmanager
def blaming(path):
    """UserError for what the user's file raises in this block: what, and on which of its lines."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""  # a SyntaxError says its line itself
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"--judge {path}{where}: {said}") from None


def hub_judge(name, device):
    """A reward model with one output, by folder or hub id.

    It reads the conversation in its own chat template, or prompt and answer as two texts.
    """
    from transformers import pipeline

    with explained(f"--judge {name}", CHOICES):  # missing files, other architectures ...
        model = pipeline(
            "text-classification",
            model=name,
            device=device,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    outputs = model.model.config.num_labels
    if outputs != 1:
        raise UserError(f"--judge {name}: a reward model has one output, this one has {outputs}.")
    # a template writes the control tokens itself
    options = {"add_special_tokens": False} if model.tokenizer.chat_template else {}

    def ask(prompts, texts):
        inputs = [classifier_input(model.tokenizer, x, y) for x, y in zip(prompts, texts)]
        # one text at a time, the pipeline's default: not all such models define a pad token
        with explained(f"--judge {name}", "Can it read texts as long as those of this run?"):
            said = model(inputs, function_to_apply="none", **options)
        return [answer["score"] for answer in said]

    return Judge(ask)


def classifier_input(tokenizer, prompt, text):
    """How a reward model from the hub reads an answer."""
    if tokenizer.chat_template:
        return {"text": tokenizer.apply_chat_template(talk(prompt, text), tokenize=False)}
    return {"text": "\n\n".join(turn["content"] for turn in prompt), "text_pair": text}
