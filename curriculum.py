"""Stage 3, reinforcement learning: the policy's problem, PIT's, and the order in which PIT's are solved.

policy    Eq. 3   x ~ D_RL, y ~ M_P^RL        max R_P(x, y)      - beta KL(M_P^RL   || M_P^SFT)
round 0   Eq. 4   y_ref in {y_w, y_l}         max gap(y, y_ref)  - beta KL(M_PIT^RL || M_PIT^SFT)       gap: see reward.py
round 1   Eq. 5   y_ref ~ M_P^RL(. | x)       the same, starting from round 0

Run: python pit.py rl --run runs/tiny (a run that `all` has begun), a minute and a half. On held-out prompts the mean R_P rises
from -2.5 to -1.2, and the mean gap over the policy's answers from 3.0 to 4.1 and 5.3.

Why rounds: answers of M_P^RL are already good, and improving them is hard to learn at once; the annotated answers leave more
to improve. A curriculum is a list of sources of y_ref: "annotated" (y_w and y_l), "policy" (M_P^RL) or "sft" (M_P^SFT).
That a round starts where the last one ended, and is held to M_PIT^SFT all along, is our reading of the paper.
"""

from functools import partial

from data import improve_prompt
from errors import UserError
from infer import answer
from ppo import train
from reward import gap
from run import shuffled_batch

# Table 2 of the paper, and two curricula more; all start from M_PIT^SFT and share out the same number of PPO iterations
CURRICULA = ["annotated", "policy", "annotated,policy", "policy,annotated", "annotated,sft,policy"]
SOURCES = {"annotated": None, "policy": "policy_rl", "sft": "policy_sft"}  # who writes y_ref


def parse(curriculum):
    """ "annotated,policy" -> ["annotated", "policy"], checked."""
    sources = [source.strip() for source in curriculum.split(",")]
    for source in sources:
        if source not in SOURCES:
            raise UserError(f"--rounds {curriculum}: {source!r} is not one of {', '.join(SOURCES)}.")
    return sources


def train_policy_rl(lm, run, pairs):
    """Eq. 3 -> adapter policy_rl."""
    cfg = run.config

    def problem(step):
        rows = shuffled_batch(len(pairs), cfg.rl_batch, step, cfg.seed)
        return [lm.encode_prompt(pairs[row].prompt) for row in rows], partial(lm.scores, "reward_policy")

    lm.add("policy_rl", like="policy_sft")
    train(lm, run, "policy_rl", "policy_sft", "reward_policy", problem, cfg.rl_steps)


def rounds(sources, total, prefix):
    """Share out `total` PPO iterations: a round for each source -> [(role, source, role it starts from, iterations)]."""
    plan = []
    for number, source in enumerate(sources):
        start = plan[-1][0] if plan else "pit_sft"
        steps = total * (number + 1) // len(sources) - total * number // len(sources)
        plan.append((f"{prefix}{number}", source, start, steps))
    return plan


def train_pit_round(lm, run, pairs, role, source, start, steps):
    """One round of PIT (Eqs. 4 and 5): `steps` iterations on references by `source`, from adapter `start` -> adapter `role`."""
    cfg = run.config

    def problem(step):
        if SOURCES[source] is None:  # each triple twice: once from its worse, once from its better answer
            rows = [pairs[row] for row in shuffled_batch(len(pairs), cfg.rl_batch // 2, step, cfg.seed)]
            rows, references = rows + rows, [pair.rejected for pair in rows] + [pair.chosen for pair in rows]
        else:
            rows = [pairs[row] for row in shuffled_batch(len(pairs), cfg.rl_batch, step, cfg.seed)]
            references = answer(lm, SOURCES[source], [pair.prompt for pair in rows], cfg)
        prompts = [lm.encode_prompt(improve_prompt(pair.prompt, y_ref)) for pair, y_ref in zip(rows, references)]
        unchanged = [lm.encode_response(y_ref) for y_ref in references]

        def score(tokens, states):
            return gap(lm, lm.scores("reward_gap", tokens, states), prompts, unchanged, cfg.micro_batch)

        return prompts, score

    lm.add(role, like=start)
    # a gap of 0 is "no change": shift=0 keeps it so, and a positive reward means better than y_ref
    train(lm, run, role, "pit_sft", "reward_gap", problem, steps, shift=0.0)
