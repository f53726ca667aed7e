"""The losses of stage 1."""

import math

import torch

import sft


def test_log_likelihood_counts_answer_tokens_only():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0]])
    assert sft.log_likelihood(logprobs, torch.tensor([[1, 1, 0]])).item() == -3.0


def test_unlikelihood_is_exact_at_both_ends():
    for s in (-1e-3, -0.1, -0.693, -0.7, -5.0, -40.0):
        value = sft.log_unlikelihood(
            torch.tensor([[s, -9.0]], dtype=torch.float64), torch.tensor([[1, 0]])
        ).item()
        assert math.isclose(value, math.log1p(-math.exp(s)), rel_tol=1e-9)


def test_unlikelihood_gradient_is_finite_and_minus_the_odds():
    s = torch.tensor([[-1e-8], [-0.3], [-2.0], [-80.0]], dtype=torch.float64, requires_grad=True)
    sft.log_unlikelihood(s, torch.ones(4, 1)).backward()
    p = s.detach().exp()
    assert torch.isfinite(s.grad).all()
    torch.testing.assert_close(s.grad[1:], (-p / (1 - p))[1:])  # d log(1 - p) / d log p


def test_unlikelihood_pushes_the_probability_of_the_sequence_down(lm, pairs):
    from models import adamw, take_step

    lm.add("role")
    tokens = lm.collate(
        [lm.encode_prompt(pairs[0].prompt)], [lm.encode_response(pairs[0].chosen)[:3]]
    )
    optimizer = adamw(lm.parameters("role"), lr=1e-3)
    seen = []
    for _ in range(4):
        lm.activate("role", train=True)
        logprobs = lm.logprobs(tokens)
        seen.append(logprobs.sum().item())
        (-sft.log_unlikelihood(logprobs, tokens.response_mask)).backward()
        take_step(optimizer, lr=1e-3)
    assert seen == sorted(seen, reverse=True) and seen[-1] < seen[0] - 0.05
