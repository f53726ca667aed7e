"""PPO: its maths one by one, then a whole run of it by hand, then on a toy problem."""

import math
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from conftest import FakeRun, shake

import ppo
from run import Run
from task import ask
from tokens import Tokens

CFG = dict(
    max_response=12,
    temperature=1.0,
    micro_batch=64,
    minibatch=8,
    epochs=1,
    rl_lr=1e-3,
    critic_lr=1e-3,
    kl=0.1,
)


# ---- the maths ---------------------------------------------------------------------------------


def brute_force_gae(rewards, values, gamma, lam):
    """A_t = sum_k (gamma lambda)^k delta_{t+k}, by definition, for one unpadded row."""
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
    # rubbish in the padding
    wide = [torch.cat([x, 7 * torch.ones(4, 3)], 1) for x in (rewards, values)]
    for a, b in zip(
        ppo.gae(rewards, values, mask),
        ppo.gae(*wide, torch.cat([mask, torch.zeros(4, 3, dtype=int)], 1)),
    ):
        torch.testing.assert_close(a, b[:, :5])
        assert (b[:, 5:] == 0).all() and (a * (1 - mask) == 0).all()


def test_k1_and_k3_average_to_the_exactly_enumerated_kl():
    torch.manual_seed(0)
    log_pi = torch.randn(9).double().log_softmax(0)
    log_ref = torch.randn(9).double().log_softmax(0)
    exact = (log_pi.exp() * (log_pi - log_ref)).sum()  # KL(pi || ref)
    for estimate in (ppo.k1, ppo.k3):
        # over all nine outcomes, weighted by pi
        expectation = (log_pi.exp() * estimate(log_pi, log_ref)).sum()
        torch.testing.assert_close(expectation, exact)
    assert (ppo.k3(log_pi, log_ref) >= 0).all() and (ppo.k1(log_pi, log_ref) < 0).any()


def test_score_lands_on_eos_and_penalty_on_every_real_token():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    # k1 = 2 on each token
    logprobs = torch.full((2, 4), -1.0)
    ref = torch.full((2, 4), -3.0)
    rewards = ppo.token_rewards(torch.tensor([10.0, 20.0]), logprobs, ref, mask, beta=0.1)
    torch.testing.assert_close(
        rewards, torch.tensor([[-0.2, -0.2, 9.8, 0.0], [19.8, 0.0, 0.0, 0.0]])
    )


def test_whiten_uses_real_tokens_only():
    x, _, mask = random_rows()
    white = ppo.whiten(x + 100 * (1 - mask), mask)
    real = white[mask.bool()]
    assert abs(real.mean()) < 1e-5 and abs(real.var(unbiased=False) - 1) < 1e-4
    assert (white[mask == 0] == 0).all()


def test_equal_advantages_are_0():
    ones = torch.ones(2, 3)
    assert (ppo.whiten(ones, ones) == 0).all()


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
    # d loss / d logprob
    assert new.grad.item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize(
    "value, old, target, loss",
    [
        (0.1, 0.0, 1.0, 0.405),
        (0.9, 0.0, 1.0, 0.32),  # clipped to 0.2
        (-0.9, 0.0, 1.0, 1.805),
    ],
)
def test_value_loss_by_hand(value, old, target, loss):
    assert ppo.value_loss(*map(torch.tensor, (value, old, target))).item() == pytest.approx(loss)


def test_normalise_clips_in_standard_deviations_from_the_mean():
    scores = ppo.normalise(torch.tensor([3.0, 5.0, 1000.0, -996.0]), scale=2.0)
    assert scores.tolist() == [0.0, 1.0, ppo.SCORE_CLIP, -ppo.SCORE_CLIP]


def test_only_an_answer_without_an_end_is_penalised():
    eos = 2
    responses = torch.tensor([[5, 2, 0], [5, 6, 2], [5, 6, 7], [2, 0, 0]])
    tokens = Tokens(responses, torch.ones(4, 3), torch.ones(4, 3))
    assert ppo.missing_eos(tokens, eos).tolist() == [0.0, 0.0, ppo.NO_EOS, 0.0]
    assert ppo.NO_EOS < 0


def test_explained_variance_is_1_for_the_returns_and_0_for_their_mean():
    returns, values, mask = random_rows()
    mean = torch.full_like(returns, ppo.masked_mean(returns, mask))
    assert ppo.explained_variance(returns + 9 * (1 - mask), returns, mask).item() == 1.0
    assert ppo.explained_variance(mean, returns, mask).item() == pytest.approx(0.0, abs=1e-6)
    worse = ppo.explained_variance(mean + 1, returns, mask).item()
    real = returns[mask.bool()]
    assert worse == pytest.approx(-1 / real.var(unbiased=False).item(), rel=1e-4)


def test_what_is_logged_of_a_rollout_by_hand():
    eos = 2
    responses = torch.tensor([[5, 6, 7], [5, 2, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    sample = SimpleNamespace(
        tokens=Tokens(responses, mask, mask),
        logprobs=torch.tensor([[-1.0, -1.0, -2.0], [-1.0, -2.0, -9.0]]),
        ref_logprobs=torch.tensor([[-1.5, -1.0, -1.0], [-3.0, -2.0, 0.0]]),
        scores=torch.tensor([3.0, -1.0]),
    )
    logged = ppo.rollout_metrics(sample, eos)
    assert logged["score"] == 1.0 and logged["length"] == 2.5 and logged["eos"] == 0.5
    # log pi - log pi_ref, summed: -0.5 and 2
    assert logged["kl"] == 0.75
    k3 = [math.exp(x) - 1 - x for x in (-0.5, 0.0, 1.0, -2.0, 0.0)]
    assert logged["k3"].item() == pytest.approx(sum(k3) / 5)


def test_bad_signs_are_told():
    eos = 2
    mask = torch.ones(2, 2).long()

    def check(responses, drift=0.0):
        run = FakeRun()
        sample = SimpleNamespace(
            tokens=Tokens(torch.tensor(responses), mask, mask),
            logprobs=torch.full((2, 2), drift),
            ref_logprobs=torch.zeros(2, 2),
            scores=torch.zeros(2),
        )
        ppo.check_health(run, sample, ppo.rollout_metrics(sample, eos))
        return run.warnings

    assert check([[5, 2], [6, 7]]) == check([[5, 2], [6, 7]], drift=0.9) == []
    assert "KL" in check([[5, 2], [6, 7]], drift=1.1)[0]
    assert "cut off" in check([[5, 5], [6, 7]])[0]
    assert "same" in check([[5, 2], [5, 2]])[0]


# ---- one iteration -----------------------------------------------------------------------------


def new_roles(lm):
    """Four adapters that differ, one of them with a head."""
    torch.manual_seed(1)
    for role in ("policy", "reference", "reward", "other"):
        lm.add(role, head=role == "reward")
        shake(lm, role)


def random_critic(lm):
    torch.manual_seed(3)
    return torch.nn.Linear(lm.hidden_size, 1)


def length_score(tokens, states):
    return tokens.response_mask.sum(1).float()


def sample_and_rate(lm, pairs, cfg, score=length_score, reference="reference", reader="reward"):
    prompts = [lm.encode_prompt(pair.prompt)[-20 - i :] for i, pair in enumerate(pairs)]
    torch.manual_seed(2)
    tokens = lm.generate("policy", prompts, cfg.max_response, cfg.temperature)
    models = dict(policy="policy", reference=reference, reward_role=reader)
    return ppo.rate(lm, tokens, score, critic=random_critic(lm), cfg=cfg, **models)


def test_each_adapter_has_its_part_in_a_rating(lm, pairs):
    new_roles(lm)
    cfg = SimpleNamespace(**CFG | dict(micro_batch=2, temperature=1.5))

    def score(tokens, states):
        return lm.scores_from_states(tokens, states)

    sample = sample_and_rate(lm, pairs[:5], cfg, score)
    tokens = sample.tokens
    critic = random_critic(lm)
    real = tokens.response_mask.bool()
    with torch.no_grad():
        for role, rated in (("policy", sample.logprobs), ("reference", sample.ref_logprobs)):
            lm.activate(role)
            expected = lm.logprobs(tokens, 1.5)
            torch.testing.assert_close(rated[real], expected[real], atol=1e-4, rtol=1e-4)
        lm.activate("reward")
        scores = lm.scores(tokens)
        values = critic(lm.hidden(tokens))[:, :-1, 0]
        torch.testing.assert_close(sample.scores, scores, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sample.values[real], values[real], atol=1e-4, rtol=1e-4)


def test_a_value_has_not_seen_its_token(lm, pairs):
    new_roles(lm)
    cfg = SimpleNamespace(**CFG)
    sample = sample_and_rate(lm, pairs[:3], cfg)
    # the same answers with another token t
    t = 4
    R = sample.values.shape[1]
    tokens = sample.tokens
    ids = tokens.ids.clone()
    ids[:, t - R] = 77
    models = dict(policy="policy", reference="reference", reward_role="reward")
    other = Tokens(ids, tokens.mask, tokens.response_mask)
    changed = ppo.rate(lm, other, length_score, critic=random_critic(lm), cfg=cfg, **models)
    difference = (changed.values - sample.values).abs()
    assert difference[:, : t + 1].max() < 1e-5 < 1e-3 < difference[:, t + 1].min()


def test_ratio_is_1_and_kl_is_0_before_the_first_update(lm4, pairs):
    for role in ("policy", "reference"):
        lm4.add(role)
    cfg = SimpleNamespace(**CFG | dict(temperature=0.6))
    sample = sample_and_rate(lm4, pairs, cfg, reader="reference")
    mask = sample.tokens.response_mask
    assert torch.equal(sample.logprobs * mask, sample.ref_logprobs * mask)
    lm4.activate("policy", train=True)
    ratio = torch.exp(lm4.logprobs(sample.tokens, 0.6) - sample.logprobs)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-4, rtol=0)


def test_updates_stop_before_the_step_that_would_move_too_far(lm, pairs, monkeypatch):
    """And what is logged is the mean of the distances before the steps, and before the stop."""
    new_roles(lm)
    cfg = SimpleNamespace(**CFG | dict(epochs=5, minibatch=64, rl_lr=1e-2))
    sample = sample_and_rate(lm, pairs[:4], cfg)
    start = [p.detach().clone() for p in lm.parameters("policy")]
    mask = sample.tokens.response_mask

    def moved():
        lm.activate("policy")
        with torch.no_grad():
            log_r = lm.logprobs(sample.tokens) - sample.logprobs
        return (((log_r.exp() - 1 - log_r) * mask).sum() / mask.sum()).item()

    distances = []
    policy_gradient = ppo.policy_gradient

    def spy(*args):
        distances.append(moved())
        lm.activate("policy", train=True)
        return policy_gradient(*args)

    monkeypatch.setattr(ppo, "policy_gradient", spy)
    for limit in (math.inf, 0.0):
        distances.clear()
        monkeypatch.setattr(ppo, "STOP_KL", limit)
        with torch.no_grad():
            for p, value in zip(lm.parameters("policy"), start):
                p.copy_(value)
        critic = random_critic(lm)
        trained = lm.parameters("policy"), list(critic.parameters())
        optimizers = [torch.optim.AdamW(parameters, eps=1e-5) for parameters in trained]
        settings = dict(decay=1.0, cfg=cfg)
        metrics = ppo.ppo_update(
            lm, "policy", critic, optimizers, sample, sample.scores, **settings
        )
        steps = [optimizer.state[p[0]]["step"] for optimizer, p in zip(optimizers, trained)]
        # with a limit of 0, the first step is free: nothing has moved before it
        assert steps == ([5, 5] if limit == math.inf else [1, 1])
        assert len(distances) == (5 if limit == math.inf else 2) and distances[1] > 0
        mean = sum(distances) / len(distances)
        assert metrics["approx_kl"].item() == pytest.approx(mean, rel=1e-3)
        assert all(p.grad is None for p in lm.parameters("policy"))


# ---- training ----------------------------------------------------------------------------------


def test_two_iterations_equal_a_plain_second_implementation(lm, pairs, monkeypatch, rates):
    """From the scores to the new parameters, one answer at a time, constants written out."""
    new_roles(lm)
    # every part matters: answers cut off, ratios outside the clip range, critics that leap
    options = dict(epochs=2, minibatch=4, micro_batch=3, temperature=1.3, max_response=14)
    rates_of = dict(rl_lr=3e-3, critic_lr=0.3, kl=0.3)
    run = FakeRun(**CFG | options | rates_of)
    start = [p.detach().clone() for p in lm.parameters("policy")]
    prompts = [lm.encode_prompt(pair.prompt)[-20 - i :] for i, pair in enumerate(pairs[:6])]

    samples = []
    orders = []
    asked = []
    rate = ppo.rate
    randperm = torch.randperm
    generate = lm.generate

    def spy_rate(*args, **kwargs):
        models = [kwargs[name] for name in ("policy", "reference", "reward_role")]
        assert models == ["policy", "reference", "reward"]
        samples.append(rate(*args, **kwargs))
        return samples[-1]

    def spy_randperm(n):
        orders.append(randperm(n))
        return orders[-1]

    def spy_generate(*args):
        asked.append(args)
        return generate(*args)

    monkeypatch.setattr(ppo, "rate", spy_rate)
    monkeypatch.setattr(ppo, "STOP_KL", math.inf)
    monkeypatch.setattr(torch, "randperm", spy_randperm)
    monkeypatch.setattr(lm, "generate", spy_generate)

    def problem(step):
        return prompts, lm.scores_from_states

    ppo.train(lm, run, "policy", problem, 2, reference="reference", reward_role="reward")
    trained = [p.detach().clone() for p in lm.parameters("policy")]
    assert asked == [("policy", prompts, 14, 1.3)] * 2 and run.kept == ["policy"]
    # policy and critic take turns; four minibatches an iteration, the second at half the rate
    assert rates[0::2] == pytest.approx([3e-3] * 4 + [1.5e-3] * 4)
    assert rates[1::2] == pytest.approx([0.3] * 4 + [0.15] * 4)
    ended = [(sample.tokens.responses == lm.eos).any(1).tolist() for sample in samples]
    assert True in ended[0] and False in ended[0]

    with torch.no_grad():
        for p, value in zip(lm.parameters("policy"), start):
            p.copy_(value)
    expected, lines = plain_ppo(lm, run.config, samples, orders)
    for ours, plain in zip(trained, expected):
        torch.testing.assert_close(ours, plain, atol=2e-5, rtol=1e-3)
    for logged, line in zip(run.lines, lines):
        assert {name: logged[name] for name in line} == pytest.approx(line, rel=1e-3, abs=1e-5)
    assert run.lines[1]["clip_fraction"] > 0.01


def plain_ppo(lm, cfg, samples, orders):
    """PPO on given samples, in given orders -> the policy's parameters, a dict per iteration."""
    policy = lm.parameters("policy")
    critic = torch.nn.Linear(lm.hidden_size, 1)
    with torch.no_grad():
        critic.weight.zero_()
        critic.bias.zero_()
    adam_policy = torch.optim.AdamW(policy, eps=1e-5, weight_decay=0.0)
    adam_critic = torch.optim.AdamW(critic.parameters(), eps=1e-5, weight_decay=0.0)
    lines = []
    scale = samples[0].scores.std().item()

    for step, sample in enumerate(samples):
        scores = []
        for score, response in zip(sample.scores.tolist(), sample.tokens.responses.tolist()):
            score = max(-5.0, min(5.0, (score - sample.scores.mean().item()) / scale))
            scores.append(score if lm.eos in response else score - 1.0)
        # of each answer: its states, log-probs, rewards, advantages, returns
        answers = []
        for i, n in enumerate(sample.tokens.response_mask.sum(1).tolist()):
            score = scores[i] - sum(scores) / len(scores)
            old = sample.logprobs[i, :n].tolist()
            ref = sample.ref_logprobs[i, :n].tolist()
            rewards = [-cfg.kl * (a - b) for a, b in zip(old, ref)]
            rewards[-1] += score
            states = sample.states[i, :n]
            values = critic(states)[:, 0].detach()
            credit = torch.tensor(brute_force_gae(rewards, values.tolist(), 1.0, ppo.LAMBDA))
            answers.append((states, torch.tensor(old), values, credit, credit + values))
        everything = torch.cat([credit for _, _, _, credit, _ in answers])
        mean = everything.mean()
        std = everything.std(unbiased=False)

        losses = []
        for order in orders[2 * step : 2 * step + 2]:
            for rows in order.split(cfg.minibatch):
                policy_loss = critic_loss = n_tokens = 0.0
                for i in rows.tolist():
                    states, old, old_values, credit, returns = answers[i]
                    A = (credit - mean) / std
                    ratio = (plain_logprobs(lm, sample, i, cfg.temperature) - old).exp()
                    surrogate = torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A)
                    policy_loss = policy_loss - surrogate.sum()
                    values = critic(states)[:, 0]
                    near = torch.clamp(values, old_values - 0.2, old_values + 0.2)
                    errors = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
                    critic_loss = critic_loss + errors.sum() / 2
                    n_tokens += len(old)
                for loss, adam, lr in (
                    (policy_loss / n_tokens, adam_policy, cfg.rl_lr),
                    (critic_loss / n_tokens, adam_critic, cfg.critic_lr),
                ):
                    adam.zero_grad()
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
                    adam.param_groups[0]["lr"] = lr * (1 - step / len(samples))
                    adam.step()
                    losses.append(loss.item())
        kl = sum((s - r).sum() for s, r in masked_rows(sample)).item() / len(answers)
        line = dict(policy_loss=sum(losses[0::2]) / 4, value_loss=sum(losses[1::2]) / 4)
        lines.append(line | dict(kl=kl, score=sample.scores.mean().item()))
    return [p.detach() for p in policy], lines


def masked_rows(sample):
    """The log-probs of each answer by policy and reference, without padding."""
    for i, n in enumerate(sample.tokens.response_mask.sum(1).tolist()):
        yield sample.logprobs[i, :n], sample.ref_logprobs[i, :n]


def plain_logprobs(lm, sample, i, temperature):
    """The log-probs of answer i by the active adapter, from the full logits of its row alone."""
    tokens = sample.tokens
    ids = tokens.ids[i][tokens.mask[i].bool()]
    n = int(tokens.response_mask[i].sum())
    logprobs = (lm.peft(input_ids=ids[None]).logits[0] / temperature).log_softmax(-1)
    return logprobs[-n - 1 : -1].gather(1, ids[-n:, None])[:, 0]


def test_scores_are_centred_and_the_scale_is_of_the_first_batch_even_after_a_stop(
    lm, pairs, tmp_path, monkeypatch
):
    lm.add("policy")
    raw = [torch.tensor([1.0, 2.0, 6.0]), torch.tensor([10.0, -20.0, 5.0])]
    penalties = torch.tensor([0.0, -1.0, -2.0])
    updated = []

    def ppo_update(lm, policy, critic, optimizers, sample, scores, **settings):
        updated.append(scores)
        return {}

    monkeypatch.setattr(ppo, "ppo_update", ppo_update)
    prompts = [lm.encode_prompt(pair.prompt) for pair in pairs[:3]]
    options = CFG | dict(model="tiny", data="synthetic", seed=0, save_every=1, max_response=2)
    models = dict(reference="policy", reward_role="policy")
    penalty = dict(penalty=lambda tokens, eos: penalties)
    for last_step in (0, 1):
        # the first start dies in its second iteration
        def problem(step, last_step=last_step):
            if step > last_step:
                raise KeyboardInterrupt
            return prompts, lambda tokens, states: raw[step]

        run = Run.start(tmp_path / "run", options)
        run.begin()
        with suppress(KeyboardInterrupt), run.stage("policy", "scores of two batches"):
            ppo.train(lm, run, "policy", problem, 2, **models, **penalty)
    for scores, of_batch in zip(updated, raw):
        expected = ((of_batch - of_batch.mean()) / raw[0].std()).clamp(-5, 5) + penalties
        torch.testing.assert_close(scores, expected - expected.mean(), atol=1e-4, rtol=1e-4)
    assert len(updated) == 2


def test_what_all_answers_earn_alike_favours_no_length(lm, pairs, monkeypatch):
    """While the critic says 0, GAE would give less to the first tokens of long answers."""
    lm.add("policy")
    seen = []

    def spy_whiten(advantages, mask):
        seen.append((advantages, mask.sum(1)))
        return advantages

    monkeypatch.setattr(ppo, "whiten", spy_whiten)
    prompts = [lm.encode_prompt(pair.prompt) for pair in pairs[:8]]
    alike = dict(penalty=lambda tokens, eos: torch.full((8,), -1.0))

    def problem(step):
        return prompts, lambda tokens, states: torch.full((8,), 7.0)

    run = FakeRun(**CFG | dict(kl=0.0, max_response=40))
    ppo.train(lm, run, "policy", problem, 1, reference="policy", reward_role="policy", **alike)
    advantages, lengths = seen[0]
    assert len(lengths.unique()) > 1 and advantages.abs().max() < 1e-6


def test_ppo_finds_the_best_answer_of_a_toy_problem(lm):
    """Score 1 where the first person looks north in the end, as the base says one time in four."""
    options = dict(minibatch=16, max_response=4, epochs=2, kl=0.01, rl_lr=4e-3, critic_lr=1e-2)
    run = FakeRun(**CFG | options)
    people = {"Ann": ("west", ["left", "back", "right", "back"])}
    prompt = lm.encode_prompt([{"role": "user", "content": ask(people)}])
    best = lm.encode_response("Now Ann north")[-2]
    for role in ("reference", "policy"):
        lm.add(role)

    def score(tokens, states):
        return (tokens.responses[:, 2] == best).float()

    def problem(step):
        return [prompt] * 32, score

    models = dict(reference="reference", reward_role="reference")
    ppo.train(lm, run, "policy", problem, 10, **models)
    scores = [line["score"] for line in run.lines]
    assert scores[0] < 0.5 and sum(scores[-3:]) / 3 > 0.9


# ---- what training hands to an update ----------------------------------------------------------


def given_to_update(lm, monkeypatch, raw, **options):
    """Train one step on these raw scores -> the run, the update's scores, its settings."""
    lm.add("policy")
    seen = []

    def update(lm, policy, critic, optimizers, sample, scores, **settings):
        seen.append((scores, settings | {"optimizers": optimizers}))
        return {}

    def problem(step):
        return [[5, 6]] * len(raw), lambda tokens, states: raw

    monkeypatch.setattr(ppo, "ppo_update", update)
    run = FakeRun(**CFG | dict(max_response=2))
    ppo.train(lm, run, "policy", problem, 1, reference="policy", reward_role="policy", **options)
    return run, *seen[0]


def test_equal_scores_are_no_division_by_0(lm, monkeypatch):
    def none(tokens, eos):
        return torch.zeros(3)

    _, scores, _ = given_to_update(lm, monkeypatch, torch.ones(3), penalty=none)
    assert scores.tolist() == [0, 0, 0]


def test_a_first_batch_of_copies_sets_no_scale(lm, monkeypatch):
    """Copies of y_ref have gaps near 0. The second batch counts, not the third."""
    lm.add("policy")
    raw = torch.tensor([[0.0, 5e-4, 0.0], [0.0, 2.0, 4.0], [0.0, 1.0, 2.0]])
    seen = []

    def update(lm, policy, critic, optimizers, sample, scores, **settings):
        seen.append(scores)
        return {}

    def problem(step):
        return [[5, 6]] * 3, lambda tokens, states: raw[step]

    def none(tokens, eos):
        return torch.zeros(3)

    monkeypatch.setattr(ppo, "ppo_update", update)
    run = FakeRun(**CFG | dict(max_response=2))
    models = dict(reference="policy", reward_role="policy")
    ppo.train(lm, run, "policy", problem, 3, penalty=none, **models)
    assert seen[0].abs().max() < 1e-3  # not divided by their tiny spread
    expected = torch.tensor([[-1.0, 0.0, 1.0], [-0.5, 0.0, 0.5]])
    torch.testing.assert_close(torch.stack(seen[1:]), expected, atol=1e-6, rtol=1e-5)


def test_the_penalty_comes_after_the_clip(lm, monkeypatch):
    raw = torch.tensor([0.0] * 63 + [-100.0])  # mean -1.5625, standard deviation 12.5

    def last_is_cut_off(tokens, eos):
        return -(raw < 0).float()

    _, scores, _ = given_to_update(lm, monkeypatch, raw, penalty=last_is_cut_off)
    assert (scores[0] - scores[-1]).item() == pytest.approx(0.125 + ppo.SCORE_CLIP + 1)


def test_an_advantage_of_ones_own_reaches_the_update(lm, monkeypatch):
    def mine(rewards, values, mask):
        return rewards, rewards

    _, _, settings = given_to_update(lm, monkeypatch, torch.ones(3), advantage=mine)
    assert settings["advantage"] is mine


def test_policy_and_critic_have_the_epsilon_of_openai(lm, monkeypatch):
    _, _, settings = given_to_update(lm, monkeypatch, torch.ones(3))
    assert [adam.param_groups[0]["eps"] for adam in settings["optimizers"]] == [1e-5, 1e-5]


def test_training_looks_for_bad_signs(lm, monkeypatch):
    run, *_ = given_to_update(lm, monkeypatch, torch.ones(3))
    assert any("cut off" in text for text in run.warnings)


@pytest.mark.parametrize("kl, steps", [(0.2, 0), (0.05, 2)])
def test_an_update_ends_at_a_tenth_of_a_nat(lm, monkeypatch, kl, steps):
    lm.add("policy")
    taken = []

    def take_step(optimizer, lr):
        taken.append(lr)
        return torch.zeros(())

    monkeypatch.setattr(ppo, "policy_gradient", lambda *_: torch.tensor([0.0, kl, 0.0]))
    monkeypatch.setattr(ppo, "take_step", take_step)
    cfg = SimpleNamespace(**CFG)
    critic = torch.nn.Linear(lm.hidden_size, 1)
    sample = ppo.rate(
        lm,
        lm.generate("policy", [[5, 6, 7]] * 2, 3),
        lambda tokens, states: torch.zeros(2),
        policy="policy",
        reference="policy",
        reward_role="policy",
        critic=critic,
        cfg=cfg,
    )
    optimizers = [
        torch.optim.AdamW(lm.parameters("policy")),
        torch.optim.AdamW(critic.parameters()),
    ]
    ppo.ppo_update(lm, "policy", critic, optimizers, sample, sample.scores, decay=1.0, cfg=cfg)
    assert len(taken) == steps  # one of the policy, one of the critic; or none
