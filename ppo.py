"""PPO for language models, written out: any (prompt -> response -> score) problem, nothing about PIT.

The objective, for prompts x and responses y sampled from the policy pi:   max E[ score(x, y) - beta KL(pi || pi_ref) ]

One iteration:
    1. sample     responses y ~ pi(. | x)                                                     rollout()
    2. score      each response with the reward model, at its last token                      rollout()
    3. reward     per token: -beta (log pi - log pi_ref), and the score on the last token     token_rewards()
    4. credit     advantages by GAE from the critic's values                                  gae()
    5. update     a few epochs of minibatches on the clipped objective                        ppo_update()

All tensors of responses are (B, R). One mask serves rewards, KL, advantages, losses and metrics:

    response        y    y    y   eos  pad  pad
    response_mask   1    1    1    1    0    0
    rewards        -bk  -bk  -bk  s-bk  0    0      b = beta, k = the token's KL estimate, s = score
    values          v0   v1   v2   v3   0    0      v_t has seen the prompt and t response tokens

The critic is a linear head on the hidden states of the reward model, which is frozen: no second trunk is trained.
Left out: reward whitening, entropy bonus, dropout. Defaults follow "The N implementation details of RLHF with PPO" (Huang et
al., 2024) unless a line says otherwise. To see it learn alone, in seconds: python -m pytest -q tests/test_ppo.py -k toy
"""

import time
from collections import Counter
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
WILD_KL = 1.0  # nats a token from the reference: that of a healthy run stays several times lower
STOP_KL = 0.1  # end the updates of an iteration once the policy has moved this far from the one that sampled


@dataclass
class Rollout:
    """What was sampled, and what was thought of it at that time. Made without gradients; B responses of up to R tokens."""

    tokens: Tokens
    logprobs: torch.Tensor  # (B, R) by the policy
    ref_logprobs: torch.Tensor  # (B, R) by the frozen reference
    states: torch.Tensor  # (B, R, D) hidden states of the reward model, which the critic reads; state t has seen t tokens
    values: torch.Tensor  # (B, R) by the critic
    scores: torch.Tensor  # (B,) raw, by the reward model


# ---- the maths: pure functions of tensors ------------------------------------------------------------------------------


def masked_mean(x, mask):  # both (B, R), as all arguments and results below where nothing else is said
    return (x * mask).sum() / mask.sum()


def whiten(x, mask):
    """Mean 0 and variance 1 over the real tokens of the whole batch."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask


def k1(logprobs, ref_logprobs):
    """log pi - log pi_ref: an unbiased estimate of KL(pi || pi_ref) on samples of pi; single values may be negative."""
    return logprobs - ref_logprobs


def k3(logprobs, ref_logprobs):
    """(r - 1) - log r with r = pi_ref / pi: unbiased too, never negative, and of lower variance (Schulman, 2020)."""
    log_r = ref_logprobs - logprobs
    return torch.expm1(log_r) - log_r


def normalise(scores, shift, scale):
    return ((scores - shift) / scale).clamp(-SCORE_CLIP, SCORE_CLIP)


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """(B,) scores -> (B, R) rewards: the KL penalty on every token, the score added to the last real one."""
    rewards = -beta * k1(logprobs, ref_logprobs) * mask
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    return rewards.scatter_add(1, last, scores.unsqueeze(1))


def gae(rewards, values, mask):
    """Generalised advantage estimation (Schulman et al., 2016) -> advantages and returns, (B, R) each.

    delta_t = r_t + gamma v_{t+1} - v_t        A_t = delta_t + gamma lambda A_{t+1}        return_t = A_t + v_t
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
    """The clipped objective of each token (Schulman et al., 2017, Eq. 7), as a loss: -min(ratio A, clip(ratio) A)."""
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP))


def value_loss(values, old_values, returns):
    """The squared error of each value, clipped to a step of VALUE_CLIP from the old value."""
    clipped = old_values + (values - old_values).clamp(-VALUE_CLIP, VALUE_CLIP)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


# ---- one iteration ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rollout(lm, policy, reference, reward_role, critic, prompts, score, cfg, seconds):
    """Sample one response for each prompt, and evaluate it with everything that the update needs."""
    with timed(seconds, "sampling"):
        tokens = lm.generate(policy, prompts, cfg.max_response, cfg.temperature)

    def evaluate(role, function):  # one role at a time
        lm.activate(role)
        return in_parts(function, tokens, cfg.micro_batch)

    with timed(seconds, "scoring"):
        states = evaluate(reward_role, lm.hidden).float()  # (B, R + 1, D)
        return Rollout(
            tokens,
            # not the log-probs of the sampler: by the same pass as in training, so that the first ratio is 1, up to rounding
            logprobs=evaluate(policy, lambda part: lm.logprobs(part, cfg.temperature)),
            ref_logprobs=evaluate(reference, lambda part: lm.logprobs(part, cfg.temperature)),
            states=states[:, :-1],
            values=critic(states[:, :-1]).squeeze(-1),
            scores=score(tokens, states),
        )


def ppo_update(lm, policy, critic, optimizers, sample, scores, beta, fraction_left, cfg):
    """Update policy and critic on one rollout. scores: (B,) normalised, penalties included -> dict of metrics."""
    mask = sample.tokens.response_mask
    rewards = token_rewards(scores, sample.logprobs, sample.ref_logprobs, mask, beta)
    advantages, returns = gae(rewards, sample.values, mask)
    advantages = whiten(advantages, mask)
    lengths = sample.tokens.mask.sum(1).cpu()  # rows are drawn on the CPU, and a CPU index selects from tensors on any device
    updates = []  # a Counter of metrics each
    lm.activate(policy, train=True)
    for _ in range(cfg.epochs):
        epoch = []
        for rows in torch.randperm(len(mask)).split(cfg.minibatch):
            # all sums are divided by the minibatch's tokens, so that the micro-batch size does not change the gradient
            n_tokens = mask[rows].sum()
            step = Counter()
            for part in rows[lengths[rows].argsort()].split(cfg.micro_batch):  # similar lengths together: little padding
                tokens = sample.tokens[part].trim()
                R = tokens.response_mask.shape[1]
                old, advantage, real = (x[part, :R] for x in (sample.logprobs, advantages, mask))
                logprobs = lm.logprobs(tokens, cfg.temperature)
                loss = (policy_loss(logprobs, old, advantage) * real).sum() / n_tokens
                loss.backward()
                logprobs = logprobs.detach()
                step["policy_loss"] += loss.item()
                step["approx_kl"] += ((k3(old, logprobs) * real).sum() / n_tokens).item()
                step["clipped"] += (((((logprobs - old).exp() - 1).abs() > CLIP) * real).sum() / n_tokens).item()
            finite("Lower --rl-lr.", policy_loss=step["policy_loss"])
            step["grad_norm"] = take_step(optimizers[0], cfg.rl_lr * fraction_left)
            values = critic(sample.states[rows]).squeeze(-1)
            loss = (value_loss(values, sample.values[rows], returns[rows]) * mask[rows]).sum() / n_tokens
            loss.backward()
            step["value_loss"] = loss.item()
            finite("Lower --critic-lr.", value_loss=step["value_loss"])
            take_step(optimizers[1], cfg.critic_lr * fraction_left)
            epoch.append(step)
        updates += epoch
        if sum(step["approx_kl"] for step in epoch) / len(epoch) > STOP_KL:
            break
    residual = masked_mean((returns - sample.values) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    means = {name: sum(step[name] for step in updates) / len(updates) for name in updates[0]}
    return means | {"explained": (1 - residual / (spread + 1e-8)).item()}


def check(run, sample, eos):
    """Stop at scores that are no numbers; warn once of what usually means that the training goes wrong."""
    finite("The reward model is broken: train it again with a lower --rm-lr.", score=sample.scores.sum())
    mask, answers = sample.tokens.response_mask, sample.tokens.responses * sample.tokens.response_mask
    if masked_mean(k1(sample.logprobs, sample.ref_logprobs), mask) > WILD_KL:
        run.warn(f"the KL is above {WILD_KL} nats a token. Try a higher --kl, a lower --rl-lr.")
    if not (sample.tokens.responses == eos).any():
        run.warn("no answer of this batch ended by itself. Try a higher --max-response, more --sft-steps.")
    if len(answers.unique(dim=0)) == 1 < len(answers):
        run.warn("all answers of this batch are alike. Try a higher --kl or --temperature, a lower --rl-lr.")


def adapt_beta(beta, kl, target, batch, horizon=1000):
    """The adaptive KL controller of Ziegler et al. (2019): beta drifts until the KL (nats an answer) is at its target.

    horizon: answers; their 10,000 is for runs of a million, and would not move beta in runs of a few thousand.
    """
    error = max(-0.2, min(0.2, kl / target - 1))
    return beta * (1 + error * batch / horizon)


@contextmanager
def timed(seconds, phase):
    """Add the seconds that the block takes to seconds[phase]."""
    started = time.perf_counter()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a GPU computes while Python goes on
    seconds[phase] += time.perf_counter() - started


def train(lm, run, role, reference, reward_role, problem, steps, shift=None):
    """PPO on adapter `role`, held to `reference`, for `steps` iterations.

    The critic is a linear head, from zeros, on the hidden states of the reward model `reward_role`: that knows what is good
    already, and since it stays frozen, one pass over a rollout serves all epochs.

    problem(step) -> prompts, lists of token ids, and score(Tokens, states) -> (B,); the states, (B, R + 1, D), are those that
    `reward_role` has of the responses. All scores are divided by the spread of the first batch, which is written before any
    update, after its mean is taken off, or `shift` where given. Logged, one line an iteration:

    score      mean raw score              kl         nats an answer between policy and reference, k1 summed over tokens
    eos        share that ended itself     length     tokens an answer, EOS included
    k3         the same KL by k3, nats a token        approx_kl  nats a token between the policy before and after the update
    clipped    share of tokens whose ratio left the clip range       explained  share of the returns' variance in the values
    """
    cfg = run.config
    critic = torch.nn.Linear(lm.hidden_size, 1, device=lm.device)
    torch.nn.init.zeros_(critic.weight)
    torch.nn.init.zeros_(critic.bias)
    optimizers = adamw(lm.parameters(role), cfg.rl_lr, ADAM_EPS), adamw(critic.parameters(), cfg.critic_lr, ADAM_EPS)
    seconds = Counter()
    numbers = {"beta": cfg.kl, "shift": shift, "scale": None}  # what a later iteration needs besides, for the checkpoint
    for step in run.steps(steps, optimizers, numbers):
        started = time.perf_counter()
        with timed(seconds, "sampling"):  # of y_ref, where a model writes it
            prompts, score = problem(step)
        seed_all(cfg.seed, run.name, step, "sample")  # however much randomness the prompts took
        sample = rollout(lm, role, reference, reward_role, critic, prompts, score, cfg, seconds)
        check(run, sample, lm.eos)
        if numbers["scale"] is None:
            mean = sample.scores.mean().item()
            numbers.update(scale=sample.scores.std().item() + 1e-6, shift=mean if shift is None else shift)
        beta = numbers["beta"]
        mask = sample.tokens.response_mask
        ended = (sample.tokens.responses == lm.eos).any(1)
        scores = normalise(sample.scores, numbers["shift"], numbers["scale"]) + NO_EOS * ~ended
        fraction_left = 1 - step / steps
        with timed(seconds, "updating"):
            metrics = ppo_update(lm, role, critic, optimizers, sample, scores, beta, fraction_left, cfg)
        kl = (k1(sample.logprobs, sample.ref_logprobs) * mask).sum(1).mean().item()
        more = {"k3": masked_mean(k3(sample.logprobs, sample.ref_logprobs), mask), "beta": beta} | metrics
        run.log(score=sample.scores.mean(), kl=kl, length=mask.sum(1).float().mean(), eos=ended.float().mean(), **more)
        if cfg.target_kl:
            numbers["beta"] = adapt_beta(beta, kl, cfg.target_kl, len(prompts))
        seconds["total"] += time.perf_counter() - started
        seconds["iterations"] += 1
    if seconds["iterations"]:  # none where a stop came between the last one and the saving of the adapter
        phases = [f"{phase} {seconds[phase] / seconds['total']:.0%}" for phase in ("sampling", "scoring", "updating")]
        print(f"  {seconds['total'] / seconds['iterations']:.1f} s an iteration: {', '.join(phases)}")
    with run.new_adapter(role) as folder:
        lm.save(role, folder)
