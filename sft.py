"""Stage 1, supervised fine-tuning: teach one base to answer, and to improve an answer.

policy     M_P^SFT     x         -> y_w       L = - sum log M_P(y_w | x)
PIT        M_PIT^SFT   x, y_l    -> y_w       L = - sum log M_PIT(y_w | x, y_l)

The paper also mentions an unlikelihood loss, without a formula. Ours, with alpha = 1, and off by
default (beta = gamma = 0):

    L = - sum [ alpha log M(y_w | x, y_l)           improve the worse
              + beta  log M(y_w | x, y_w)           keep the better
              + gamma log(1 - M(y_l | x, y_w)) ]    never make it worse

Each sum is divided by the answer tokens of its batch; the learning rate falls linearly to 0. Left
out: dropout, packing.

Run: python pit.py sft --run runs/tiny (a run that `all` has begun), half a minute. The loss falls
from 0.36 to 0.2 nats per token for the policy, from 0.44 to 0.3 for PIT.
"""

import torch

from data import improve_prompt
from models import adamw, take_step
from run import shuffled_batch
from tokens import micro_batches


def train_policy(lm, run, pairs):
    """M_P^SFT from D_SFT -> adapter policy_sft."""
    if run.load_trained(lm, "policy_sft"):
        return
    with run.stage("policy_sft", "learn to answer, from the better answers (x -> y_w)"):
        examples = [
            (lm.encode_prompt(pair.prompt), lm.encode_response(pair.chosen)) for pair in pairs
        ]
        train(lm, run, "policy_sft", [(1.0, log_likelihood, examples)])


def train_pit(lm, run, pairs):
    """M_PIT^SFT from D_SFT -> adapter pit_sft."""
    if run.load_trained(lm, "pit_sft"):
        return
    with run.stage("pit_sft", "learn to improve, from both answers (x, y_l -> y_w)"):
        beta, gamma = run.config.keep_better, run.config.unlikelihood
        # improve the worse
        terms = [(1.0, log_likelihood, pit_examples(lm, pairs, "rejected", "chosen"))]
        # keep the better
        if beta > 0:
            terms.append((beta, log_likelihood, pit_examples(lm, pairs, "chosen", "chosen")))
        # never make it worse
        if gamma > 0:
            terms.append((gamma, log_unlikelihood, pit_examples(lm, pairs, "chosen", "rejected")))
        train(lm, run, "pit_sft", terms)


def pit_examples(lm, pairs, y_ref, y):
    """(x, y_ref) -> y for each pair, as [(prompt ids, response ids)].

    y_ref and y name the answer of a pair: "chosen" or "rejected".
    """
    examples = []
    for pair in pairs:
        prompt = improve_prompt(pair.prompt, getattr(pair, y_ref))
        examples.append((lm.encode_prompt(prompt), lm.encode_response(getattr(pair, y))))
    return examples


def train(lm, run, role, terms):
    """Maximise the weighted sum of `terms` and save the adapter `role`.

    terms: (weight, objective, examples) each; examples: (prompt ids, response ids) each. All
    training loops lean on run.py: `steps` yields the steps still to do and keeps checkpoints,
    `shuffled_batch` picks the rows of a step, `log` writes a line of metrics.jsonl.
    """
    cfg = run.config
    lm.add(role)
    optimizer = adamw(lm.parameters(role), cfg.sft_lr)
    n_pairs = len(terms[0][2])
    for step in run.steps(cfg.sft_steps, [optimizer]):
        rows = shuffled_batch(n_pairs, cfg.sft_batch, step, cfg.seed)
        # gradients add up over the terms of the loss and over micro-batches
        lm.activate(role, train=True)
        loss = torch.zeros((), device=lm.device)
        for weight, objective, examples in terms:
            batch = [examples[row] for row in rows]
            n_tokens = sum(len(response) for _, response in batch)
            for part in micro_batches(batch, cfg.micro_batch, example_length):
                tokens = lm.collate(*zip(*part))
                value = objective(lm.logprobs(tokens), tokens.response_mask)
                # divided by the tokens of the whole batch: the micro-batch size changes no gradient
                part_loss = -weight * value / n_tokens
                part_loss.backward()
                loss += part_loss.detach()
        # linear decay to 0
        norm = take_step(optimizer, cfg.sft_lr * (1 - step / cfg.sft_steps))
        run.log(loss=loss, grad_norm=norm)
    run.keep(lm, role)


def example_length(example):
    prompt, response = example
    return len(prompt) + len(response)


def log_likelihood(logprobs, mask):
    """sum log M(y | .) over a batch; both arguments (B, R)."""
    return (logprobs * mask).sum()


def log_unlikelihood(logprobs, mask):
    """sum log(1 - M(y_t | .)) over the answer tokens of a batch; both arguments (B, R).

    Per token, as in Welleck et al. (2020): the probability of a whole answer is so small that
    log(1 - M(y | .)) would have no gradient to speak of.
    """
    # log(1 - e^s) = log(-expm1(s)) keeps its digits where e^s is near 1 (Maechler, 2012)
    s = logprobs.clamp(max=-1e-6)
    return (torch.log(-torch.expm1(s)) * mask).sum()
