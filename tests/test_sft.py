"""Stage 1: what is learned from what, and by which loss."""

import pytest
import torch
from conftest import FakeRun

import sft
from data import IMPROVE, improve_prompt, synthetic_pairs

OPTIONS = dict(sft_steps=6, sft_batch=8, sft_lr=1.5e-3)


def policy_examples(lm, pairs, y):
    """x -> y for each pair, token ids; y is "chosen" or "rejected"."""
    return [(lm.encode_prompt(pair.prompt), lm.encode_response(getattr(pair, y))) for pair in pairs]


def pit_examples(lm, pairs, y_ref, y):
    """x, y_ref -> y for each pair."""
    prompts = [improve_prompt(pair.prompt, getattr(pair, y_ref)) for pair in pairs]
    return [
        (lm.encode_prompt(prompt), lm.encode_response(getattr(pair, y)))
        for prompt, pair in zip(prompts, pairs)
    ]


def rise(lm, role, examples):
    """By how much training has raised the log-probability of an answer, in nats per answer."""
    tokens = lm.collate(*zip(*examples))
    with torch.no_grad():
        lm.activate(role)
        after = (lm.logprobs(tokens) * tokens.response_mask).sum()
        lm.activate("blank")
        before = (lm.logprobs(tokens) * tokens.response_mask).sum()
    return (after - before).item() / len(examples)


def test_log_likelihood_counts_answer_tokens_only():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0]])
    assert sft.log_likelihood(logprobs, torch.tensor([[1, 1, 0]])).item() == -3.0


def test_the_policy_learns_to_write_better_answers_it_has_not_seen(lm):
    """The likelihood of the worse ones rises, too: the base knows flawless answers only."""
    pairs = synthetic_pairs(56, seed=1)
    sft.train_policy(lm, FakeRun(**OPTIONS), pairs[:48])
    assert rise(lm, "policy_sft", policy_examples(lm, pairs[48:], "chosen")) > 0.2


def test_pit_learns_to_go_from_the_worse_answer_to_the_better_one(lm):
    pairs = synthetic_pairs(56, seed=1)
    sft.train_pit(lm, FakeRun(**OPTIONS), pairs[:48])
    better = rise(lm, "pit_sft", pit_examples(lm, pairs[48:], "rejected", "chosen"))
    worse = rise(lm, "pit_sft", pit_examples(lm, pairs[48:], "chosen", "rejected"))
    assert better > 0.2 and better > worse + 0.2


def test_to_improve_is_to_answer_once_more_after_ones_own_answer():
    x = {"role": "user", "content": "x"}
    y_ref = {"role": "assistant", "content": "y_ref"}
    assert improve_prompt([x], "y_ref") == [x, y_ref, {"role": "user", "content": IMPROVE}]


def test_each_stage_reads_and_writes_the_answers_of_its_formula(lm, pairs, monkeypatch):
    seen = []
    monkeypatch.setattr(sft, "train", lambda lm, run, role, examples: seen.append(examples))
    sft.train_policy(lm, FakeRun(**OPTIONS), pairs)
    sft.train_pit(lm, FakeRun(**OPTIONS), pairs)
    improve = pit_examples(lm, pairs, "rejected", "chosen")
    assert seen == [policy_examples(lm, pairs, "chosen"), improve]


def test_the_gradient_is_that_of_the_mean_over_answer_tokens(lm, pairs, monkeypatch):
    """One step in micro-batches, against a plain loop over rows."""
    examples = policy_examples(lm, pairs[:5], "chosen")
    seen = []

    def take_step(optimizer, lr):
        seen.extend(p.grad for p in optimizer.param_groups[0]["params"])
        return 0.0

    monkeypatch.setattr(sft, "take_step", take_step)
    run = FakeRun(**OPTIONS | dict(sft_steps=1, sft_batch=5, micro_batch=2))
    sft.train(lm, run, "role", examples)

    loss = 0.0
    n_tokens = sum(len(response) for _, response in examples)
    for prompt, response in examples:
        logits = lm.peft(input_ids=torch.tensor([prompt + response])).logits[0]
        logprobs = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt + response) - 1)]
        loss = loss - logprobs.gather(1, torch.tensor(response)[:, None]).sum() / n_tokens
    expected = torch.autograd.grad(loss, lm.parameters("role"))
    assert run.lines[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for ours, plain in zip(seen, expected):
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-3)


def test_each_pass_sees_every_pair_once_while_the_learning_rate_falls_to_0(
    lm, pairs, rates, monkeypatch
):
    seen = []
    collate = lm.collate

    def spy(prompts, responses):
        seen.extend(tuple(prompt) for prompt in prompts)
        return collate(prompts, responses)

    monkeypatch.setattr(lm, "collate", spy)
    run = FakeRun(**OPTIONS | dict(sft_steps=6, sft_batch=4, sft_lr=6e-3))
    sft.train_policy(lm, run, pairs)
    once = sorted(tuple(lm.encode_prompt(pair.prompt)) for pair in pairs)
    assert sorted(seen[:12]) == sorted(seen[12:]) == once and seen[:12] != seen[12:]
    assert rates == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])
    assert run.kept == ["policy_sft"]
