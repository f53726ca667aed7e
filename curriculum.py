"""Stage 3, reinforcement learning: the policy's problem, and PIT's problems in rising difficulty.

policy    Eq. 3   x ~ D_RL, y ~ M_P^RL        max R_P(x, y)      - beta KL(M_P^RL   || M_P^SFT)
round 0   Eq. 4   y_ref in {y_w, y_l}         max gap(y, y_ref)  - beta KL(M_PIT^RL || M_PIT^SFT)
round 1   Eq. 5   y_ref ~ M_P^RL(. | x)       the same, starting from round 0   (gap: see reward.py)

The paper's reason for rounds: answers of M_P^RL are already better than y_w, and improving them is
hard to learn from scratch. (On our two tasks with an exact rule, they are far below y_w.) A
curriculum is a list of sources of y_ref: "annotated" (y_w and y_l), "policy" (M_P^RL), "sft"
(M_P^SFT), or "given" (the column `response` of the data, by any other writer). That a round starts
where the last one ended, and is held to M_PIT^SFT all along, is our reading of the paper.

Run: python pit.py rl --run runs/tiny (a run that `all` has begun), a minute or two. On
held-out prompts the mean R_P rises by 1.3 (its zero is arbitrary), and the mean gap over the
policy's answers from 2.7 to 3.9 and 5.1.
"""

from functools import partial

from data import improve_prompt
from errors import UserError
from ppo import train
from reward import rewards
from run import shuffled_batch

# Table 2 of the paper, and two more. All start from M_PIT^SFT, with the same number of iterations.
CURRICULA = [
    "annotated",
    "policy",
    "annotated,policy",
    "policy,annotated",
    "annotated,sft,policy",
]
WRITERS = {"policy": "policy_rl", "sft": "policy_sft"}  # roles that write y_ref
EQUATIONS = {"annotated": " (Eq. 4)", "policy": " (Eq. 5)"}  # the other sources are ours


def check_given(sources, pairs):
    """Fail early where a round needs answers that the data does not have."""
    if "given" in sources and any(pair.given is None for pair in pairs):
        raise UserError("--rounds given: every row of --data needs a column `response`.")


def round_steps(cfg):
    """The PPO iterations of each round of a run -> list of numbers."""
    *others, _ = cfg.rounds.split(",")
    return [cfg.rl_steps] * len(others) + [cfg.last_steps or cfg.rl_steps]


def share_out(total, n):
    """`total` PPO iterations for n rounds -> n whole numbers, as equal as can be."""
    # where round k ends, round k + 1 begins
    ends = [total * k // n for k in range(n + 1)]
    return [end - first for first, end in zip(ends, ends[1:])]


def rounds(sources, steps, prefix):
    """One round per source of y_ref, with these numbers of PPO iterations.

    -> (role, source, start, iterations) of each; start is the role that it starts from.
    """
    roles = [f"{prefix}{number}" for number in range(len(sources))]
    # the first starts from M_PIT^SFT, each other where the last one ended
    starts = ["pit_sft", *roles[:-1]]
    return zip(roles, sources, starts, steps, strict=True)


# ---- the policy --------------------------------------------------------------------------------


def policy_problem(lm, pairs, cfg, step):
    """Eq. 3, one PPO iteration: answer x -> prompts, score (as `ppo.train` wants them)."""
    batch = shuffled_batch(pairs, cfg.rl_batch, step, cfg.seed)
    prompts = [lm.encode_prompt(pair.prompt) for pair in batch]
    # R_P(x, y), from the states that the critic reads, too
    return prompts, lm.scores_from_states


def train_policy_rl(lm, run, pairs):
    """Eq. 3 -> adapter policy_rl."""
    if run.load_trained(lm, "policy_rl"):
        return
    with run.stage("policy_rl", "PPO: better answers by R_P (Eq. 3)"):
        lm.add("policy_rl", like="policy_sft")
        train(
            lm,
            run,
            "policy_rl",
            problem=partial(policy_problem, lm, pairs, run.config),
            steps=run.config.rl_steps,
            reference="policy_sft",
            reward_role="reward_policy",
        )


# ---- PIT ---------------------------------------------------------------------------------------


def draw_references(lm, pairs, source, step, cfg):
    """The x and y_ref of one PPO iteration -> rl_batch chats, and as many texts.

    An annotated round takes both answers of a pair, so one fewer if rl_batch is odd.
    """
    if source == "annotated":
        # Eq. 4: each triple twice, once from its worse, once from its better answer
        triples = shuffled_batch(pairs, cfg.rl_batch // 2, step, cfg.seed)
        chats = [pair.prompt for pair in triples] * 2
        return chats, [pair.rejected for pair in triples] + [pair.chosen for pair in triples]
    batch = shuffled_batch(pairs, cfg.rl_batch, step, cfg.seed)
    chats = [pair.prompt for pair in batch]
    if source == "given":
        return chats, [pair.given for pair in batch]
    # Eq. 5: a model writes y_ref, at temperature 1, as in the evaluation
    return chats, lm.answer(WRITERS[source], chats, cfg)


def gap_problem(lm, pairs, source, cfg, step):
    """Eqs. 4 and 5, one PPO iteration: improve y_ref -> prompts, score (see `ppo.train`)."""
    xs, references = draw_references(lm, pairs, source, step, cfg)
    chats = list(map(improve_prompt, xs, references))
    # does not depend on y: a baseline, which lowers the variance where y is often a copy of y_ref
    unchanged = rewards(lm, "reward_gap", chats, references, cfg)  # (B,)

    def score(tokens, states):
        # the gap: r(x, y, y_ref) - r(x, y_ref, y_ref)
        return lm.scores_from_states(tokens, states) - unchanged

    return [lm.encode_prompt(chat) for chat in chats], score


def train_pit_round(lm, run, pairs, *, role, source, start, steps):
    """One round of PIT (Eqs. 4 and 5) -> adapter `role`.

    `steps` iterations on references by `source`, from adapter `start` on.
    """
    if run.load_trained(lm, role):
        return
    why = f"PPO: larger gaps by R_PIT over {source} answers{EQUATIONS.get(source, '')}"
    with run.stage(role, why):
        lm.add(role, like=start)
        train(
            lm,
            run,
            role,
            problem=partial(gap_problem, lm, pairs, source, run.config),
            steps=steps,
            reference="pit_sft",
            reward_role="reward_gap",
        )
