"""Stage 1, supervised fine-tuning: teach one base to answer, and to improve an answer.

policy     M_P^SFT     x         -> y_w       L = - sum log M_P(y_w | x)
PIT        M_PIT^SFT   x, y_l    -> y_w       L = - sum log M_PIT(y_w | x, y_l)

The paper mentions an unlikelihood loss besides, without a formula. Ours, off by default (alpha = 1, beta = gamma = 0):

    L = - sum [ alpha log M(y_w | x, y_l) + beta log M(y_w | x, y_w) + gamma log(1 - M(y_l | x, y_w)) ]
                improve the worse           keep the better            never make it worse

Each sum is divided by the answer tokens of its batch; the learning rate falls linearly to 0. Left out: dropout, packing.
Run: python pit.py sft --run runs/tiny (a run that `all` has begun), half a minute. The loss falls from 0.36 to 0.2 nats a token
for the policy, from 0.44 to 0.3 for PIT.
"""

import torch

from data import improve_prompt
from errors import finite
from models import adamw, take_step
from run import shuffled_batch
from tokens import micro_batches


def train_policy(lm, run, pairs):
    """M_P^SFT from D_SFT -> adapter policy_sft."""
    examples = [(lm.encode_prompt(pair.prompt), lm.encode_response(pair.chosen)) for pair in pairs]
    train(lm, run, "policy_sft", [(1.0, log_likelihood, examples)])


def train_pit(lm, run, pairs):
    """M_PIT^SFT from D_SFT -> adapter pit_sft."""
    cfg = run.config

    def examples(y_ref, y):  # "chosen" or "rejected" each
        prompts = (improve_prompt(pair.prompt, getattr(pair, y_ref)) for pair in pairs)
        return [(lm.encode_prompt(prompt), lm.encode_response(getattr(pair, y))) for prompt, pair in zip(prompts, pairs)]

    terms = [
        (1.0, log_likelihood, "rejected", "chosen"),
        (cfg.keep_better, log_likelihood, "chosen", "chosen"),
        (cfg.unlikelihood, log_unlikelihood, "chosen", "rejected"),
    ]
    train(lm, run, "pit_sft", [(weight, objective, examples(*which)) for weight, objective, *which in terms if weight > 0])


def train(lm, run, role, terms):
    """Maximise the weighted sum of `terms`: (weight, objective, examples); examples are (prompt ids, response ids).

    All training loops lean on run.py: `steps` yields the steps still to do and keeps checkpoints, `shuffled_batch` says which
    rows a step sees, `finite` stops at NaN, `log` writes a line of metrics.jsonl, `new_adapter` is the folder for the result.
    """
    cfg = run.config
    lm.add(role)
    optimizer = adamw(lm.parameters(role), cfg.sft_lr)
    for step in run.steps(cfg.sft_steps, [optimizer]):
        rows = shuffled_batch(len(terms[0][2]), cfg.sft_batch, step, cfg.seed)
        loss = 0.0
        lm.activate(role, train=True)
        for weight, objective, examples in terms:
            n_tokens = sum(len(examples[row][1]) for row in rows)
            for some in micro_batches([examples[row] for row in rows], cfg.micro_batch, lambda example: sum(map(len, example))):
                tokens = lm.collate(*zip(*some))
                # divided by the whole batch's tokens, so that the micro-batch size does not change the gradient
                part = -weight * objective(lm.logprobs(tokens), tokens.response_mask) / n_tokens
                part.backward()
                loss += part.item()
        finite("Lower --sft-lr, or look for odd texts in the data.", loss=loss)
        norm = take_step(optimizer, cfg.sft_lr * (1 - step / cfg.sft_steps))
        run.log(loss=loss, grad_norm=norm)
    with run.new_adapter(role) as folder:
        lm.save(role, folder)


def log_likelihood(logprobs, mask):
    """sum log M(y | .) over a batch; both arguments (B, R)."""
    return (logprobs * mask).sum()


def log_unlikelihood(logprobs, mask):
    """sum log(1 - M(y | .)) over a batch, M being the probability of the whole sequence; both arguments (B, R).

    log(1 - e^s) loses all digits where e^s is near 0 or 1; log1p(-e^s) and log(-expm1(s)) are exact there (Maechler, 2012).
    """
    s = (logprobs * mask).sum(1).clamp(max=-1e-6)  # (B,) log-probability of each answer
    rare = s < -0.693  # e^s < 1/2; torch.where differentiates both branches, so each sees only values that it can bear
    of_rare = torch.log1p(-torch.exp(torch.where(rare, s, -1.0)))
    of_likely = torch.log(-torch.expm1(torch.where(rare, -0.1, s)))
    return torch.where(rare, of_rare, of_likely).sum()
