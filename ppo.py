"""PPO for language models, written out for any (prompt -> response -> score) problem.

The objective, for prompts x and responses y sampled from the policy pi:

    max E[ score(x, y) / scale - beta KL(pi || pi_ref) ]

where the scale is the standard deviation of the scores in a stage's first batch; so the same beta
means something different in each stage. Both pi and pi_ref are taken at the sampling temperature.
One iteration:
    1. sample   responses y ~ pi(. | x)                                       lm.generate()
    2. rate     log-probs, values, and the reward model's score at the end    rate()
    3. reward   -beta (log pi - log pi_ref) per token, the score on the last  token_rewards()
    4. credit   advantages by GAE from the critic's values                    gae()
    5. update   a few epochs of minibatches on the clipped objective          ppo_update()

All tensors of responses are (B, R). One mask serves rewards, KL, advantages, losses and metrics:

    response        y    y    y   eos  pad  pad
    response_mask   1    1    1    1    0    0
    rewards        -bk  -bk  -bk  s-bk  0    0      b = beta, k = the token's KL estimate, s = score
    values          v0   v1   v2   v3   0    0      v_t has seen the prompt and t response tokens

The critic is a linear head on the hidden states of the reward model, which is frozen: no second
trunk is trained. Constants follow "The N implementation details of RLHF with PPO" (Huang et al.,
2024). Unlike there, beta is fixed, critic and policy have optimisers of their own, the scores of
each batch are centred and clipped, a missing EOS lowers the score instead of replacing it, there
are two epochs, updates on a batch end when the KL to its sampling policy gets large, and gradients
are clipped. Left out: reward whitening, entropy bonus, dropout, a mix of pretraining data.

Run: python -m pytest -q tests/test_ppo.py -k toy (PPO alone, on a toy problem, in seconds)
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from models import adamw, take_step, zero_head
from run import seed_all
from tokens import Tokens, in_parts

GAMMA = 1.0  # an answer is judged as a whole: its first token counts as much as its last
LAMBDA = 0.95  # Huang et al.
ADAM_EPS = 1e-5  # Huang et al.: as in OpenAI's code, smaller steps where gradients are tiny
CLIP = 0.2  # of the probability ratio (Schulman et al., 2017)
VALUE_CLIP = 0.2  # Huang et al.
SCORE_CLIP = 5.0  # in standard deviations, so that one outlier does not dominate a batch
NO_EOS = -1.0  # added to the normalised score of an answer that was cut off
WILD_KL = 1.0  # nats per token from the reference: a healthy run stays several times lower
NO_SPREAD = 1e-3  # standard deviation of raw scores: below it, they may differ by rounding alone
STOP_KL = 0.1  # nats per token from the policy that sampled: above it, updates on this sample end


@dataclass
class Rollout:
    """B responses of up to R tokens, and how they were rated when sampled. No gradients."""

    tokens: Tokens
    logprobs: Tensor  # (B, R) by the policy
    ref_logprobs: Tensor  # (B, R) by the frozen reference
    states: Tensor  # (B, R, D) by the reward model, for the critic; state t gives value t
    values: Tensor  # (B, R) by the critic
    scores: Tensor  # (B,) raw, by the reward model


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
    """(r - 1) - log r with r = pi_ref / pi: also unbiased, never negative, with lower variance.

    Source: Schulman, "Approximating KL divergence", 2020.
    """
    log_r = ref_logprobs - logprobs
    return torch.expm1(log_r) - log_r


def normalise(scores, scale):
    """(B,) raw scores -> (B,) distances from their mean, in units of `scale`, clipped."""
    return ((scores - scores.mean()) / scale).clamp(-SCORE_CLIP, SCORE_CLIP)


def ended(tokens, eos):
    """Whether each response has an EOS, or else was cut off -> (B,) bool."""
    return (tokens.responses == eos).any(1)


def missing_eos(tokens, eos):
    """The penalty for answers that were cut off -> (B,): NO_EOS for each, 0 for the others."""
    return NO_EOS * (~ended(tokens, eos)).float()


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """(B,) scores -> (B, R) rewards: a KL penalty on each token, the score on the last real one."""
    rewards = -beta * k1(logprobs, ref_logprobs) * mask
    # where the EOS is, or the token at which the answer was cut off
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards, values, mask):
    """Generalised advantage estimation (Schulman et al., 2016) -> advantages and returns.

        delta_t  = r_t + gamma v_{t+1} - v_t
        A_t      = delta_t + gamma lambda A_{t+1}
        return_t = A_t + v_t

    After the last real token both v and A are 0.
    """
    values = values * mask
    # from the last token back to the first
    advantages = torch.zeros_like(values)
    next_advantage = next_value = 0.0  # then (B,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        next_advantage = (delta + GAMMA * LAMBDA * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def policy_loss(logprobs, old_logprobs, advantages):
    """The clipped objective of each token, as a loss: -min(ratio A, clip(ratio) A).

    Source: Schulman et al., 2017, Eq. 7.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    return torch.max(-advantages * ratio, -advantages * clipped)


def value_loss(values, old_values, returns):
    """Half the squared error of each value, or of its clipped version, whichever is larger.

    The clipped one is at most VALUE_CLIP away from the old value.
    """
    clipped = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def explained_variance(values, returns, mask):
    """The share of the returns' variance that the values explain -> scalar.

    1: all of it. 0: no more than a constant does.
    """
    residual = masked_mean((returns - values) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return 1 - residual / (variance + 1e-8)


# ---- one iteration -----------------------------------------------------------------------------


def logprobs_by(lm, role, tokens, cfg):
    """The log-probs of sampled Tokens by `role`, at their temperature -> (B, R)."""
    lm.activate(role)
    return in_parts(lambda part: lm.logprobs(part, cfg.temperature), tokens, cfg.micro_batch)


@torch.no_grad()
def rate(lm, tokens, score, *, policy, reference, reward_role, critic, cfg):
    """Step 2: all that the update needs to know about sampled Tokens -> Rollout."""
    # One pass of the reward model serves the scores and the critic. There is a state before the
    # first token and one after each: R + 1.
    lm.activate(reward_role)
    states = in_parts(lm.hidden, tokens, cfg.micro_batch).float()  # (B, R + 1, D)
    scores = score(tokens, states)
    # the value of token t may not see it: states[:, t] has seen t tokens, so drop the last state
    critic_states = states[:, :-1]
    # The policy's log-probs come from training's own forward pass, not from the sampler, so that
    # the first ratio is 1 up to rounding. In a bf16 base, rounding is coarse: even so, |ratio - 1|
    # was 0.02 on average, and about 1% of tokens began outside the clip range.
    return Rollout(
        tokens=tokens,
        logprobs=logprobs_by(lm, policy, tokens, cfg),
        ref_logprobs=logprobs_by(lm, reference, tokens, cfg),
        states=critic_states,
        values=critic(critic_states).squeeze(-1),
        scores=scores,
    )


def ppo_update(lm, policy, critic, optimizers, sample, scores, *, decay, cfg, advantage=gae):
    """Steps 3 to 5: update policy and critic on one rollout -> dict of metrics.

    scores: (B,) normalised, penalties included, centred. decay: the factor of the learning rates.
    """
    mask = sample.tokens.response_mask
    # 3. reward
    rewards = token_rewards(scores, sample.logprobs, sample.ref_logprobs, mask, cfg.kl)
    # 4. credit
    advantages, returns = advantage(rewards, sample.values, mask)
    advantages = whiten(advantages, mask)
    # 5. update
    policy_optimizer, critic_optimizer = optimizers
    history = defaultdict(list)  # each metric: one value per minibatch
    lm.activate(policy, train=True)
    for rows in minibatches(len(mask), cfg.minibatch, cfg.epochs):
        # the policy; once it has moved too far, the whole update ends, the critic's too
        loss, kl, clip_fraction = policy_gradient(lm, sample, advantages, rows, cfg)
        history["approx_kl"].append(kl)
        if kl > STOP_KL:
            policy_optimizer.zero_grad()  # drop this gradient, too
            break
        norm = take_step(policy_optimizer, cfg.rl_lr * decay)
        history["policy_loss"].append(loss)
        history["clip_fraction"].append(clip_fraction)
        history["grad_norm"].append(norm)

        # the critic
        values = critic(sample.states[rows]).squeeze(-1)
        per_token = value_loss(values, sample.values[rows], returns[rows])
        critic_loss = masked_mean(per_token, mask[rows])
        critic_loss.backward()
        take_step(critic_optimizer, cfg.critic_lr * decay)
        history["value_loss"].append(critic_loss.detach())
    metrics = {name: torch.stack(values).mean() for name, values in history.items()}
    metrics["explained_variance"] = explained_variance(sample.values, returns, mask)
    return metrics


def minibatches(n, size, epochs):
    """The rows of each minibatch: `epochs` passes over n responses, each in a new order.

    Drawn on the CPU: a CPU index selects from tensors on any device.
    """
    for _ in range(epochs):
        yield from torch.randperm(n).split(size)


def policy_gradient(lm, sample, advantages, rows, cfg):
    """Backpropagate the policy's loss on one minibatch: its gradients add up in .grad.

    -> (3,): the loss, the KL from the policy that sampled, the share of tokens whose ratio is
    outside the clip range. All sums are divided by the minibatch's tokens, so that the micro-batch
    size changes the gradient only by rounding (4 to 5% of it with 4-bit weights that are multiplied
    in bf16).
    """
    n_tokens = sample.tokens.response_mask[rows].sum()
    totals = 0.0
    # similar lengths go together, for little padding
    lengths = sample.tokens.mask.sum(1).cpu()
    for part in rows[lengths[rows].argsort()].split(cfg.micro_batch):
        tokens = sample.tokens[part].trim()
        mask = tokens.response_mask
        R = mask.shape[1]
        old_logprobs = sample.logprobs[part, :R]
        logprobs = lm.logprobs(tokens, cfg.temperature)
        per_token = policy_loss(logprobs, old_logprobs, advantages[part, :R])
        loss = (per_token * mask).sum() / n_tokens
        loss.backward()
        with torch.no_grad():
            kl = (k3(old_logprobs, logprobs) * mask).sum() / n_tokens
            outside = (torch.exp(logprobs - old_logprobs) - 1).abs() > CLIP
            outside_share = (outside * mask).sum() / n_tokens
            totals += torch.stack([loss.detach(), kl, outside_share])
    return totals


# ---- training ----------------------------------------------------------------------------------


def train(
    lm, run, role, problem, steps, *, reference, reward_role, advantage=gae, penalty=missing_eos
):
    """PPO on adapter `role`, held to `reference`, for `steps` iterations; then save the adapter.

    The critic is a linear head, from zeros, on the hidden states of the reward model `reward_role`:
    that model already knows what is good, and since it stays frozen, one pass over a rollout serves
    all epochs.

    problem(step) gives two things: the prompts (lists of token ids), and a function
        score(tokens, states) -> (B,), the raw scores. Its states, (B, R + 1, D), are those of
        `reward_role`, whose adapter is active then.
    Two more functions, for variants of your own (all stages keep the defaults):
    advantage(rewards, values, mask) -> advantages, returns.
    penalty(tokens, eos) -> (B,), added to the normalised scores, which are then centred again;
        not part of the logged score.
    """
    cfg = run.config
    critic = zero_head(lm.hidden_size, lm.device)
    optimizers = (
        adamw(lm.parameters(role), cfg.rl_lr, ADAM_EPS),
        adamw(critic.parameters(), cfg.critic_lr, ADAM_EPS),
    )
    # what later iterations need besides the parameters: it goes into the checkpoints
    state = {"scale": None}
    for step in run.steps(steps, optimizers, state):
        # What to answer, and how to score it. Then seed again, so that samples do not depend on how
        # much the problem drew.
        prompts, score = problem(step)
        seed_all(cfg.seed, run.name, step, "sample")
        tokens = lm.generate(role, prompts, cfg.max_response, cfg.temperature)
        sample = rate(
            lm,
            tokens,
            score,
            policy=role,
            reference=reference,
            reward_role=reward_role,
            critic=critic,
            cfg=cfg,
        )
        logged = rollout_metrics(sample, lm.eos)
        check_health(run, sample, logged)

        # Scores in standard deviations of the first batch, which is sampled before any update.
        # Centred: a reward that all answers of a batch share is no reason to change any of them.
        # Left in, at lambda < 1, it favours short or long answers until the critic learns it.
        # A batch whose scores differ by rounding alone sets no scale: copies of y_ref, for example,
        # all have a gap of 0.
        spread = sample.scores.std().item() + 1e-6
        if state["scale"] is None and spread > NO_SPREAD:
            state["scale"] = spread
        scores = normalise(sample.scores, state["scale"] or 1.0) + penalty(tokens, lm.eos)
        scores = scores - scores.mean()

        # update; the learning rate decays linearly to 0
        decay = 1 - step / steps
        metrics = ppo_update(
            lm, role, critic, optimizers, sample, scores, decay=decay, cfg=cfg, advantage=advantage
        )
        run.log(**logged, **metrics)
    run.keep(lm, role)


def rollout_metrics(sample, eos):
    """What is logged of a rollout, one line per iteration -> dict of scalars.

        score               mean raw score
        kl                  from policy to reference, nats per answer: the sum of k1
        k3                  the same KL, nats per token
        length              tokens per answer, EOS included
        eos                 share of answers with an EOS

    From `ppo_update`, besides losses and the policy's gradient norm, the same line has:

        approx_kl           KL from the policy that sampled, before each step, nats per token
        clip_fraction       share of tokens whose ratio left the clip range
        explained_variance  share of the returns' variance that the critic's values explain
    """
    mask = sample.tokens.response_mask
    kl = k1(sample.logprobs, sample.ref_logprobs) * mask
    return {
        "score": sample.scores.mean(),
        "kl": kl.sum(1).mean(),
        "length": mask.sum(1).float().mean(),
        "eos": ended(sample.tokens, eos).float().mean(),
        "k3": masked_mean(k3(sample.logprobs, sample.ref_logprobs), mask),
    }


def check_health(run, sample, logged):
    """Warn, once per stage, of signs that training goes wrong. logged: from `rollout_metrics`."""
    if logged["kl"] / logged["length"] > WILD_KL:
        run.warn(f"the KL is above {WILD_KL} nats per token. Raise --kl or lower --rl-lr.")
    if logged["eos"] == 0:
        run.warn("every answer was cut off. Try a higher --max-response or more --sft-steps.")
    # after EOS all are padded alike
    if len(sample.tokens.responses.unique(dim=0)) == 1:
        run.warn("all answers are the same. Raise --kl or --temperature, or lower --rl-lr.")
