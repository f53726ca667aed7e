"""Stage 3, reinforcement learning: the policy's problem, PIT's, and the order in which PIT's are solved.

policy    Eq. 3   x ~ D_RL, y ~ M_P           max R_P(x, y)          - beta KL(M_P^RL   || M_P^SFT)
round 0   Eq. 4   y_ref in {y_w, y_l}         max R_PIT(x, y, y_ref) - beta KL(M_PIT^RL || M_PIT^SFT)
round 1   Eq. 5   y_ref ~ M_P^RL(. | x)       the same, starting from round 0

Why rounds: answers of M_P^RL are already good, and improving them is hard to learn at once; the annotated answers leave more
to improve. A curriculum is a list of sources of y_ref: "annotated" (y_w and y_l), "policy" (M_P^RL) or "sft" (M_P^SFT).
That a round starts where the last one ended, and is held to M_PIT^SFT all along, is our reading of the paper.
"""

from torch.nn.init import zeros_

from data import improve_prompt
from models import in_parts
from ppo import train
from run import UserError, shuffled_batch

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

    def prompts(step):
        rows = shuffled_batch(len(pairs), cfg.rl_batch, step, cfg.seed)
        return [lm.encode_prompt(pairs[row].prompt) for row in rows]

    solve(lm, run, "policy_rl", "policy_sft", "policy_sft", "reward_policy", prompts)


def train_pit_round(lm, run, pairs, number, source):
    """One round of PIT (Eqs. 4 and 5) -> adapter pit_rl{number}."""
    cfg = run.config

    def prompts(step):
        if SOURCES[source] is None:  # each triple twice: once from its worse, once from its better answer
            rows = [pairs[row] for row in shuffled_batch(len(pairs), cfg.rl_batch // 2, step, cfg.seed)]
            references = [(pair, y_ref) for pair in rows for y_ref in (pair.rejected, pair.chosen)]
        else:
            rows = [pairs[row] for row in shuffled_batch(len(pairs), cfg.rl_batch, step, cfg.seed)]
            written = lm.generate(SOURCES[source], [lm.encode_prompt(pair.prompt) for pair in rows], cfg.max_response)
            references = zip(rows, lm.decode(written.responses))
        return [lm.encode_prompt(improve_prompt(pair.prompt, y_ref)) for pair, y_ref in references]

    start = f"pit_rl{number - 1}" if number else "pit_sft"
    # "no change" is worth 0 to R_PIT: shift=0 keeps it so, and a positive reward means better than y_ref
    solve(lm, run, f"pit_rl{number}", start, "pit_sft", "reward_gap", prompts, shift=0.0)


def solve(lm, run, role, start, reference, reward, prompts, shift=None):
    """PPO from adapter `start` to the new adapter `role`, scored by `reward`, with a critic on a copy of its trunk."""

    def score(tokens):
        lm.activate(reward)
        return in_parts(lambda part: lm.scores(reward, part), tokens, run.config.micro_batch)

    lm.add(role, like=start)
    # The reward model's trunk knows what is good. Its head, read before the end of an answer, says nothing of returns: as a
    # first value function it explained -3.4 of their variance. A head of zeros explains 0, and learns.
    lm.add("critic", like=reward, head=True)
    zeros_(lm.heads["critic"].weight)
    zeros_(lm.heads["critic"].bias)
    train(lm, run, role, reference, "critic", prompts, score, shift)
    lm.remove("critic")
