"""PPO: its maths one by one, then the whole on a problem with a known best answer."""

import math
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import shake

import ppo
from run import Run
from task import ask

CFG = dict(
    max_response=12,
    temperature=1.0,
    micro_batch=64,
    minibatch=8,
    epochs=1,
    rl_lr=1e-3,
    critic_lr=1e-3,
    save_every=10,
)


def brute_force_gae(rewards, values, gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, straight from the definition, for one unpadded row."""
    n = len(rewards)
    v = [*values, 0.0]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


def random_rows(seed=0, lengths=(5, 3, 1, 4)):
    torch.manual_seed(seed)
    R = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (R - n) for n in lengths])
    return torch.randn(len(lengths), R) * mask, torch.randn(len(lengths), R), mask


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0)])
def test_gae_equals_the_definition(gamma, lam, monkeypatch):
    monkeypatch.setattr(ppo, "GAMMA", gamma)
    monkeypatch.setattr(ppo, "LAMBDA", lam)
    rewards, values, mask = random_rows()
    advantages, returns = ppo.gae(rewards, values, mask)
    for i, n in enumerate(mask.sum(1).tolist()):
        expected = torch.tensor(
            brute_force_gae(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        )
        torch.testing.assert_close(advantages[i, :n], expected)
        torch.testing.assert_close(returns[i, :n], expected + values[i, :n])


def test_gae_is_invariant_to_padding():
    rewards, values, mask = random_rows()
    wide = [
        torch.cat([x, 7 * torch.ones(4, 3)], 1) for x in (rewards, values)
    ]  # rubbish in the padding
    for a, b in zip(
        ppo.gae(rewards, values, mask),
        ppo.gae(*wide, torch.cat([mask, torch.zeros(4, 3, dtype=int)], 1)),
    ):
        torch.testing.assert_close(a, b[:, :5])
        assert (b[:, 5:] == 0).all() and (a * (1 - mask) == 0).all()


def test_k1_and_k3_average_to_the_exactly_enumerated_kl():
    torch.manual_seed(0)
    log_pi, log_ref = torch.randn(9).double().log_softmax(0), torch.randn(9).double().log_softmax(0)
    exact = (log_pi.exp() * (log_pi - log_ref)).sum()  # KL(pi || ref)
    for estimate in (ppo.k1, ppo.k3):
        expectation = (
            log_pi.exp() * estimate(log_pi, log_ref)
        ).sum()  # over all nine outcomes, weighted by pi
        torch.testing.assert_close(expectation, exact)
    assert (ppo.k3(log_pi, log_ref) >= 0).all() and (ppo.k1(log_pi, log_ref) < 0).any()


def test_score_lands_on_eos_and_penalty_on_every_real_token():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    logprobs, ref = torch.full((2, 4), -1.0), torch.full((2, 4), -3.0)  # k1 = 2 on each token
    rewards = ppo.token_rewards(torch.tensor([10.0, 20.0]), logprobs, ref, mask, beta=0.1)
    torch.testing.assert_close(
        rewards, torch.tensor([[-0.2, -0.2, 9.8, 0.0], [19.8, 0.0, 0.0, 0.0]])
    )


def test_whiten_uses_real_tokens_only():
    x, _, mask = random_rows()
    white = ppo.whiten(x + 100 * (1 - mask), mask)
    real = white[mask.bool()]
    assert (
        abs(real.mean()) < 1e-5
        and abs(real.var(unbiased=False) - 1) < 1e-4
        and (white[mask == 0] == 0).all()
    )


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.0, 2.0, -2.0, -2.0),  # untouched
        (1.1, 2.0, -2.2, -2.2),  # inside the range
        (1.5, 2.0, -2.4, 0.0),  # good and already made likelier: no further push
        (0.5, 2.0, -1.0, -1.0),  # good but made less likely: pushed back
        (1.5, -2.0, 3.0, 3.0),  # bad but made likelier: pushed back
        (0.5, -2.0, 1.6, 0.0),  # bad and already made less likely: no further push
    ],
)
def test_policy_loss_by_hand(ratio, advantage, loss, slope):
    old = torch.tensor(-1.0)
    new = (old + math.log(ratio)).requires_grad_()
    got = ppo.policy_loss(new, old, torch.tensor(advantage))
    got.backward()
    assert got.item() == pytest.approx(loss, rel=1e-5)
    assert new.grad.item() == pytest.approx(
        slope, abs=1e-5
    )  # d loss / d logprob = slope of ratio * A


@pytest.mark.parametrize(
    "value, old, target, loss",
    [
        (0.1, 0.0, 1.0, 0.405),
        (0.9, 0.0, 1.0, 0.32),
        (-0.9, 0.0, 1.0, 1.805),
    ],  # the middle one is clipped to 0.2
)
def test_value_loss_by_hand(value, old, target, loss):
    assert ppo.value_loss(*map(torch.tensor, (value, old, target))).item() == pytest.approx(loss)


def test_normalise_clips_in_standard_deviations():
    scores = ppo.normalise(torch.tensor([3.0, 5.0, 1000.0]), shift=3.0, scale=2.0)
    assert scores.tolist() == [0.0, 1.0, ppo.SCORE_CLIP]


def test_adaptive_beta_moves_towards_the_target():
    assert (
        ppo.adapt_beta(0.1, kl=9.0, target=6.0, batch=64)
        > 0.1
        > ppo.adapt_beta(0.1, kl=3.0, target=6.0, batch=64)
    )


def make_rollout(
    lm,
    pairs,
    cfg,
    score=lambda tokens, states: tokens.response_mask.sum(1).float(),
    reader="reference",
):
    for role in ("policy", "reference"):
        lm.add(role)
    prompts = [lm.encode_prompt(pair.prompt) for pair in pairs]
    return ppo.rollout(
        lm,
        prompts,
        score,
        policy="policy",
        reference="reference",
        reward_role=reader,
        critic=new_critic(lm),
        cfg=cfg,
        seconds=Counter(),
    )


def new_critic(lm):
    torch.manual_seed(3)
    return torch.nn.Linear(lm.hidden_size, 1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_ratio_is_1_and_kl_is_0_before_the_first_update(lm4, pairs, temperature):
    cfg = SimpleNamespace(**CFG | dict(temperature=temperature))
    sample = make_rollout(lm4, pairs, cfg)
    mask = sample.tokens.response_mask
    assert torch.equal(sample.logprobs * mask, sample.ref_logprobs * mask)
    lm4.activate("policy", train=True)
    ratio = torch.exp(lm4.logprobs(sample.tokens, temperature) - sample.logprobs)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)


def test_scores_from_the_critics_states_are_those_of_a_pass_of_their_own(lm, pairs):
    lm.add("reward", head=True)
    shake(lm, "reward")
    verdict = partial(lm.scores_from_states, "reward")
    sample = make_rollout(
        lm, pairs, SimpleNamespace(**CFG | dict(micro_batch=5)), verdict, reader="reward"
    )
    lm.activate("reward")
    with torch.no_grad():
        own_pass = lm.scores("reward", sample.tokens)
    torch.testing.assert_close(sample.scores, own_pass, atol=1e-4, rtol=1e-4)


def test_micro_batch_size_does_not_change_the_update(lm, pairs):
    results = []
    sample = make_rollout(lm, pairs, SimpleNamespace(**CFG))
    for size in (1, 3, 64):
        torch.manual_seed(1)
        cfg = SimpleNamespace(**CFG | dict(micro_batch=size, minibatch=6))
        lm.add("policy")
        critic = new_critic(lm)
        trained = lm.parameters("policy"), list(critic.parameters())
        # plain gradient descent: Adam would magnify the rounding of near-zero gradients
        optimizers = [torch.optim.SGD(parameters, lr=1e-3) for parameters in trained]
        torch.manual_seed(2)
        ppo.ppo_update(
            lm, "policy", critic, optimizers, sample, sample.scores, beta=0.05, decay=1.0, cfg=cfg
        )
        results.append([p.detach().clone() for parameters in trained for p in parameters])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_updates_stop_early_when_the_policy_has_moved_too_far(lm, pairs, monkeypatch):
    sample = make_rollout(lm, pairs, SimpleNamespace(**CFG))
    steps = []
    monkeypatch.setattr(ppo, "take_step", lambda optimizer, lr, advice: steps.append(lr) or 0.0)
    for limit, expected in ((math.inf, 4), (-1.0, 1)):
        steps.clear()
        monkeypatch.setattr(ppo, "STOP_KL", limit)
        cfg = SimpleNamespace(**CFG | dict(epochs=4, minibatch=64))
        ppo.ppo_update(
            lm,
            "policy",
            new_critic(lm),
            [None, None],
            sample,
            sample.scores,
            beta=0.05,
            decay=1.0,
            cfg=cfg,
        )
        assert len(steps) == 2 * expected


def test_ppo_finds_the_best_answer_of_a_toy_problem(lm, tmp_path):
    """Score 1 for an answer that has the first person look north in the end: the base says so once in four times."""
    options = CFG | dict(
        seed=0,
        rl_steps=16,
        minibatch=16,
        max_response=4,
        epochs=2,
        kl=0.01,
        target_kl=0.0,
        rl_lr=3e-3,
    )
    run = Run.start(tmp_path / "toy", options)
    prompt = lm.encode_prompt(
        [{"role": "user", "content": ask({"Ann": ("west", ["left", "back", "right", "back"])})}]
    )
    best = lm.encode_response("Now Ann north")[-2]
    for role in ("reference", "policy"):
        lm.add(role)

    def score(tokens, states):
        return (tokens.responses[:, 2] == best).float()

    with run.stage("toy", "find the best answer"):
        ppo.train(
            lm,
            run,
            "policy",
            lambda step: ([prompt] * 32, score),
            16,
            reference="reference",
            reward_role="reference",
        )
    scores = [line["score"] for line in run.metrics()]
    assert scores[0] < 0.5 and sum(scores[-3:]) / 3 > 0.9
