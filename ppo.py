"""PPO for language models, written out: any (prompt -> response -> score) problem, nothing about PIT.

The objective, for prompts x and responses y sampled from the policy pi:

    max E[ score(x, y) - beta KL(pi || pi_ref) ]

One iteration:
    1. sample     responses y ~ pi(. | x)                                               rollout()
    2. score      each response with the reward model, at its last token                rollout()
    3. reward     per token: -beta (log pi - log pi_ref); the score on the last token   token_rewards()
    4. credit     advantages by GAE from the critic's values                            gae()
    5. update     a few epochs of minibatches on the clipped objective                  ppo_update()

All tensors of responses are (B, R). One mask serves rewards, KL, advantages, losses and metrics:

    response        y    y    y   eos  pad  pad
    response_mask   1    1    1    1    0    0
    rewards        -bk  -bk  -bk  s-bk  0    0      b = beta, k = the token's KL estimate, s = score
    values          v0   v1   v2   v3   0    0      v_t has seen the prompt and t response tokens

The critic is a linear head on the hidden states of the reward model, which is frozen: no second trunk is
trained. Left out: reward whitening, entropy bonus, dropout. Defaults follow "The N implementation details
of RLHF with PPO" (Huang et al., 2024) unless a line says otherwise.

Run: python -m pytest -q tests/test_ppo.py -k toy (PPO alone, on a toy problem, in seconds)
"""

import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from errors import finite
from models import adamw, take_step
from run import seed_all
from tokens import Tokens, in_parts

GAMMA = 1.0  # an answer is judged as a whole: its first token counts as much as its last
LAMBDA = 0.95  # Huang et al.
ADAM_EPS = 1e-5  # Huang et al.: as in OpenAI's code, smaller steps where gradients are tiny
CLIP = 0.2  # of the probability ratio (Schulman et al., 2017)
VALUE_CLIP = 0.2  # Huang et al.
SCORE_CLIP = 5.0  # in standard deviations: one freak score must not rule a batch
NO_EOS = -1.0  # added to the normalised score of an answer that was cut off
WILD_KL = 1.0  # nats per token from the reference: a healthy run stays several times lower
STOP_KL = 0.1  # nats per token from the policy that sampled: ends the updates of an iteration


@dataclass
class Rollout:
    """What was sampled, and how it was rated at that time: B responses of up to R tokens, no gradients."""

    tokens: Tokens
    logprobs: torch.Tensor  # (B, R) by the policy
    ref_logprobs: torch.Tensor  # (B, R) by the frozen reference
    states: torch.Tensor  # (B, R, D) by the reward model, for the critic; state t has seen t tokens
    values: torch.Tensor  # (B, R) by the critic
    scores: torch.Tensor  # (B,) raw, by the reward model


# ---- the maths: pure functions of tensors; arguments and results are (B, R) unless noted -------


def masked_mean(x, mask):
    """The mean over real tokens -> scalar."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and variance 1 over the real tokens of the whole batch."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def k1(logprobs, ref_logprobs):
    """log pi - log pi_ref: unbiased for KL(pi || pi_ref) on samples of pi; may be negative."""
    return logprobs - ref_logprobs


def k3(logprobs, ref_logprobs):
    """(r - 1) - log r with r = pi_ref / pi: unbiased too, never negative, of lower variance.

    Source: Schulman, "Approximating KL divergence", 2020.
    """
    log_r = ref_logprobs - logprobs
    return torch.expm1(log_r) - log_r


def normalise(scores, shift, scale):
    """(B,) raw scores -> (B,) in standard deviations, clipped."""
    return ((scores - shift) / scale).clamp(-SCORE_CLIP, SCORE_CLIP)


def missing_eos(tokens, eos):
    """The penalty for answers that were cut off -> (B,): NO_EOS for each, 0 for the others."""
    ended = (tokens.responses == eos).any(1)
    return NO_EOS * (~ended).float()


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """(B,) scores -> (B, R) rewards: the KL penalty on every token, the score on the last real one."""
    rewards = -beta * k1(logprobs, ref_logprobs) * mask
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards, values, mask):
    """Generalised advantage estimation (Schulman et al., 2016) -> advantages and returns.

    delta_t = r_t + gamma v_{t+1} - v_t      A_t = delta_t + gamma lambda A_{t+1}      return_t = A_t + v_t
    After the last real token both v and A are 0.
    """
    values = values * mask
    advantages = torch.zeros_like(values)
    next_advantage = next_value = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        next_advantage = (delta + GAMMA * LAMBDA * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages):
    """The clipped objective of each token, as a loss: -min(ratio A, clip(ratio) A).

    Source: Schulman et al., 2017, Eq. 7.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return torch.max(-advantages * ratio, -advantages * clipped)


def value_loss(values, old_values, returns):
    """The squared error of each value, clipped to a step of VALUE_CLIP from the old value."""
    clipped = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values, returns, mask):
    """The share of the returns' variance that the values explain -> scalar; 1: all, 0: as a constant."""
    residual = masked_mean((returns - values) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - residual / (variance + 1e-8)


# ---- one iteration -----------------------------------------------------------------------------


@torch.no_grad()
def rollout(lm, prompts, score, *, policy, reference, reward_role, critic, cfg, seconds):
    """Steps 1 and 2: sample a response to each prompt, and rate it with all that the update needs."""
    # 1. sample
    with timed(seconds, "sampling"):
        tokens = lm.generate(policy, prompts, cfg.max_response, cfg.temperature)

    def logprobs(part):
        return lm.logprobs(part, cfg.temperature)

    with timed(seconds, "scoring"):
        # 2. score: one pass of the reward model serves the scores and the critic
        lm.activate(reward_role)
        states = in_parts(lm.hidden, tokens, cfg.micro_batch).float()  # (B, R + 1, D)
        # The log-probs are not the sampler's, but those of the same pass as in training, so that the
        # first ratio is 1 up to rounding.
        lm.activate(policy)
        policy_logprobs = in_parts(logprobs, tokens, cfg.micro_batch)
        lm.activate(reference)
        ref_logprobs = in_parts(logprobs, tokens, cfg.micro_batch)
        # the value of a token must not see it: without the last state, states[:, t] has seen t tokens
        critic_states = states[:, :-1]
        return Rollout(
            tokens=tokens,
            logprobs=policy_logprobs,
            ref_logprobs=ref_logprobs,
            states=critic_states,
            values=critic(critic_states).squeeze(-1),
            scores=score(tokens, states),
        )


def ppo_update(lm, policy, critic, optimizers, sample, scores, *, beta, decay, cfg, advantage=gae):
    """Steps 3 to 5: update policy and critic on one rollout -> dict of metrics.

    scores: (B,) normalised, penalties included. decay: what the learning rates are multiplied by.
    """
    mask = sample.tokens.response_mask
    # 3. reward
    rewards = token_rewards(scores, sample.logprobs, sample.ref_logprobs, mask, beta)
    # 4. credit
    advantages, returns = advantage(rewards, sample.values, mask)
    advantages = whiten(advantages, mask)
    # 5. update
    policy_optimizer, critic_optimizer = optimizers
    # rows are drawn on the CPU: a CPU index selects from tensors on any device
    lengths = sample.tokens.mask.sum(1).cpu()
    history = defaultdict(list)  # of each metric, a value per minibatch
    lm.activate(policy, train=True)
    for _ in range(cfg.epochs):
        for rows in torch.randperm(len(mask)).split(cfg.minibatch):
            # divided by the minibatch's tokens, so that the micro-batch size does not change the gradient
            n_tokens = mask[rows].sum()
            totals = torch.zeros(3, device=lm.device)  # policy loss, KL, share of clipped tokens
            # similar lengths go together, for little padding
            for part in rows[lengths[rows].argsort()].split(cfg.micro_batch):
                totals += policy_gradient(lm, sample, advantages, part, n_tokens, cfg)
            loss, kl, clip_fraction = totals
            norm = take_step(policy_optimizer, cfg.rl_lr * decay, "Lower --rl-lr.")
            history["policy_loss"].append(loss)
            history["approx_kl"].append(kl)
            history["clip_fraction"].append(clip_fraction)
            history["grad_norm"].append(torch.tensor(norm))

            values = critic(sample.states[rows]).squeeze(-1)
            per_token = value_loss(values, sample.values[rows], returns[rows]) * mask[rows]
            loss = per_token.sum() / n_tokens
            loss.backward()
            take_step(critic_optimizer, cfg.critic_lr * decay, "Lower --critic-lr.")
            history["value_loss"].append(loss.detach())
        n_minibatches = -(-len(mask) // cfg.minibatch)
        if torch.stack(history["approx_kl"][-n_minibatches:]).mean() > STOP_KL:
            break
    metrics = {name: torch.stack(values).mean() for name, values in history.items()}
    explained = explained_variance(sample.values, returns, mask)
    return metrics | {"explained_variance": explained}


def policy_gradient(lm, sample, advantages, rows, n_tokens, cfg):
    """Add one micro-batch's gradient -> (3,): its part of the policy loss, of the KL to the old policy,
    and of the share of clipped tokens."""
    tokens = sample.tokens[rows].trim()
    R = tokens.response_mask.shape[1]
    mask = tokens.response_mask
    old_logprobs = sample.logprobs[rows, :R]
    logprobs = lm.logprobs(tokens, cfg.temperature)
    per_token = policy_loss(logprobs, old_logprobs, advantages[rows, :R]) * mask
    loss = per_token.sum() / n_tokens
    loss.backward()
    with torch.no_grad():
        kl = (k3(old_logprobs, logprobs) * mask).sum() / n_tokens
        outside = (torch.exp(logprobs - old_logprobs) - 1).abs() > CLIP
        clip_fraction = (outside * mask).sum() / n_tokens
    return torch.stack([loss.detach(), kl, clip_fraction])


# ---- training ----------------------------------------------------------------------------------


def train(
    lm,
    run,
    role,
    problem,
    steps,
    *,
    reference,
    reward_role,
    shift=None,
    advantage=gae,
    penalty=missing_eos,
):
    """PPO on adapter `role`, held to `reference`, for `steps` iterations; then save the adapter.

    The critic is a linear head, from zeros, on the hidden states of the reward model `reward_role`: it
    already knows what is good, and since it stays frozen, one pass over a rollout serves all epochs.

    problem(step) -> prompts, lists of token ids, and score(Tokens, states) -> (B,) raw scores; the states,
    (B, R + 1, D), are those of `reward_role`. Scores are divided by their standard deviation in the first
    batch, which is written before any update, after its mean is subtracted, or `shift` where given.
    advantage(rewards, values, mask) -> advantages, returns. penalty(Tokens, eos) -> (B,), added to the
    normalised scores, and not part of the logged score.

    Logged, one line per iteration:

    score          mean raw score               kl          nats per answer, policy to reference: sum of k1
    eos            share with an EOS            length      tokens per answer, EOS included
    k3             the same KL, nats per token  approx_kl   nats per token, sampling policy to updated one
    clip_fraction  share of tokens whose ratio left the clip range
    explained_variance  share of the returns' variance that the critic's values explain
    """
    cfg = run.config
    critic = zero_head(lm.hidden_size, lm.device)
    optimizers = (
        adamw(lm.parameters(role), cfg.rl_lr, ADAM_EPS),
        adamw(critic.parameters(), cfg.critic_lr, ADAM_EPS),
    )
    seconds = defaultdict(float)
    # what later iterations need besides the parameters: it goes into the checkpoints
    state = {"beta": cfg.kl, "shift": shift, "scale": None}
    for step in run.steps(steps, optimizers, state):
        started = time.perf_counter()
        with timed(seconds, "sampling"):  # of y_ref, where a model writes it
            prompts, score = problem(step)
        seed_all(cfg.seed, run.name, step, "sample")  # whatever randomness the prompts took
        sample = rollout(
            lm,
            prompts,
            score,
            policy=role,
            reference=reference,
            reward_role=reward_role,
            critic=critic,
            cfg=cfg,
            seconds=seconds,
        )
        check(run, sample, lm.eos)

        # scores in standard deviations of the first batch: `state` keeps shift and scale from then on
        if state["scale"] is None:
            state["scale"] = sample.scores.std().item() + 1e-6
            if shift is None:
                state["shift"] = sample.scores.mean().item()
        scores = normalise(sample.scores, state["shift"], state["scale"])
        scores = scores + penalty(sample.tokens, lm.eos)

        with timed(seconds, "updating"):
            metrics = ppo_update(
                lm,
                role,
                critic,
                optimizers,
                sample,
                scores,
                beta=state["beta"],
                decay=1 - step / steps,
                cfg=cfg,
                advantage=advantage,
            )
        measured = describe(sample, lm.eos)
        run.log(**measured, beta=state["beta"], **metrics)
        if cfg.target_kl:
            kl = float(measured["kl"])
            state["beta"] = adapt_beta(state["beta"], kl, cfg.target_kl, len(prompts))
        seconds["total"] += time.perf_counter() - started
        seconds["iterations"] += 1
    print_seconds(seconds)
    run.keep(lm, role)


def zero_head(hidden_size, device):
    """The critic: a linear head whose first value is 0 everywhere."""
    critic = torch.nn.Linear(hidden_size, 1, device=device)
    torch.nn.init.zeros_(critic.weight)
    torch.nn.init.zeros_(critic.bias)
    return critic


def describe(sample, eos):
    """The metrics of a rollout -> dict of scalars; see `train` for what they mean."""
    mask = sample.tokens.response_mask
    kl = k1(sample.logprobs, sample.ref_logprobs) * mask
    ended = (sample.tokens.responses == eos).any(1)
    return {
        "score": sample.scores.mean(),
        "kl": kl.sum(1).mean(),
        "length": mask.sum(1).float().mean(),
        "eos": ended.float().mean(),
        "k3": masked_mean(k3(sample.logprobs, sample.ref_logprobs), mask),
    }


def check(run, sample, eos):
    """Stop at scores that are not numbers; warn once of what usually means that training goes wrong."""
    advice = "The reward model is broken: train it again with a lower --rm-lr."
    finite(advice, score=sample.scores.sum())
    mask = sample.tokens.response_mask
    if masked_mean(k1(sample.logprobs, sample.ref_logprobs), mask) > WILD_KL:
        run.warn(f"the KL is above {WILD_KL} nats per token. Try a higher --kl, a lower --rl-lr.")
    if not (sample.tokens.responses == eos).any():
        run.warn("every answer was cut off. Try a higher --max-response, more --sft-steps.")
    answers = sample.tokens.responses * mask
    if len(answers) > 1 and len(answers.unique(dim=0)) == 1:
        run.warn("all answers are the same. Try a higher --kl or --temperature, a lower --rl-lr.")


def adapt_beta(beta, kl, target, batch, horizon=1000):
    """The adaptive KL controller of Ziegler et al. (2019): beta drifts until the KL is at its target.

    kl, target: nats per answer. horizon: answers; their 10,000 is for runs of a million, and would not move
    beta in runs of a few thousand.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + error * batch / horizon)


@contextmanager
def timed(seconds, phase):
    """Add the seconds that the block takes to seconds[phase]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a GPU is still computing when Python goes on
    seconds[phase] += time.perf_counter() - started


def print_seconds(seconds):
    """One line: seconds per iteration, and where they went."""
    if not seconds["iterations"]:  # all iterations were done before this start
        return
    shares = [
        f"{p} {seconds[p] / seconds['total']:.0%}" for p in ("sampling", "scoring", "updating")
    ]
    print(f"  {seconds['total'] / seconds['iterations']:.1f} s per iteration: {', '.join(shares)}")
