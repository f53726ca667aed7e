"""Stage 2, reward models: learn from pairs what better means, as a score and as a gap.

R_P      r(x, y)            how good y is.                   Bradley-Terry: - sum log sigma(r(x, y_w) - r(x, y_l))
R_PIT    r(x, y, y_ref)     how much better y is than y_ref. Eq. 2, over five comparisons, below

R_P reads the turns (x, y); R_PIT reads (x, y_ref, "Please improve ...", y), which are the very tokens that M_P and M_PIT write.
So "score" always means: read the transcript, and take the scalar head's output at the last token.
"""

import torch
import torch.nn.functional as F

from data import improve_prompt
from models import adamw, take_step
from run import shuffled_batch

FOUR = [("chosen", "rejected"), ("chosen", "chosen"), ("rejected", "rejected"), ("rejected", "chosen")]  # (y, y_ref)
NAMES = ["wl", "ww", "ll", "lw"]  # the paper's superscripts: candidate first


def bradley_terry(chosen, rejected):
    """- log sigma(r_w - r_l) of each pair; both arguments and the result (B,). log 2 at a tie."""
    return -F.logsigmoid(chosen - rejected)


def gap_loss(wl, ww, ll, lw):
    """Eq. 2 of each pair: -log sigma over the five comparisons of Eq. 1, r^wl >= r^ww ~ r^ll >= r^lw; all (B,).

    Nothing pins r^ww and r^ll to 0, but both are pulled up against r^lw as strongly as down against r^wl: they end halfway.
    """
    comparisons = [(wl, ww), (wl, ll), (wl, lw), (ww, lw), (ll, lw)]
    return sum(bradley_terry(better, worse) for better, worse in comparisons)


def answer_transcripts(lm, pair):
    """What R_P reads of a pair: [(x, y_w), (x, y_l)], each as (prompt ids, response ids)."""
    prompt = lm.encode_prompt(pair.prompt)
    return [(prompt, lm.encode_response(pair.chosen)), (prompt, lm.encode_response(pair.rejected))]


def gap_transcripts(lm, pair):
    """What R_PIT reads of a pair: (x, y_ref, y) for wl, ww, ll, lw, each as (prompt ids, response ids)."""
    return [
        (lm.encode_prompt(improve_prompt(pair.prompt, getattr(pair, y_ref))), lm.encode_response(getattr(pair, y)))
        for y, y_ref in FOUR
    ]


def train_policy_reward(lm, run, pairs, held_out, role="reward_policy"):
    """A Bradley-Terry model of single answers -> adapter and head `role`: R_P from D_RM, the judge from pairs of its own."""
    train(lm, run, role, "policy_sft", answer_transcripts, bradley_terry, pairs)
    chosen, rejected = score_pairs(lm, role, answer_transcripts, held_out, run.config.micro_batch)
    report(lm, run, role, {"accuracy": (chosen > rejected).float().mean().item()})


def train_gap_reward(lm, run, pairs, held_out):
    """R_PIT from D_RM -> adapter and head reward_gap, with "no change" worth 0 on average."""
    role = "reward_gap"
    train(lm, run, role, "reward_policy", gap_transcripts, gap_loss, pairs)
    scores = score_pairs(lm, role, gap_transcripts, held_out, run.config.micro_batch)  # (4, N)
    # Measure what "no change" is worth, and take it off the head's bias: from here on, above 0 means better than y_ref.
    # Only the differences of the four enter Eq. 2, so the loss is as before.
    wl, ww, ll, lw = scores
    no_change = torch.cat([ww, ll]).mean()
    with torch.no_grad():
        lm.heads[role].bias -= no_change
    outer = (wl - lw).mean()
    measured = {
        "accuracy": torch.cat([wl > no_change, lw < no_change]).float().mean().item(),  # is the sign right?
        "order": ((wl > ww) & (wl > ll) & (ww > lw) & (ll > lw)).float().mean().item(),  # Eq. 1 in full
        "no_change": no_change.item(),
        "middle": ((ww - ll).mean() / outer).item(),  # distance of the two middles, as a share of the outer gap
        **{f"mean_{name}": (row - no_change).mean().item() for name, row in zip(NAMES, scores)},
    }
    report(lm, run, role, measured)


def report(lm, run, role, measured):
    run.add_results(reward=run.results().get("reward", {}) | {role: measured})
    print("  held out: " + "  ".join(f"{name} {value:.2f}" for name, value in measured.items()))
    with run.new_adapter(role) as folder:
        lm.save(role, folder)


def train(lm, run, role, start, transcripts_of, loss_of, pairs):
    """Minimise loss_of(the k scores of a pair) where transcripts_of(lm, pair) gives the k transcripts to score."""
    cfg = run.config
    lm.add(role, like=start, head=True)
    optimizer = adamw(lm.parameters(role), cfg.rm_lr)
    transcripts = [transcripts_of(lm, pair) for pair in pairs]
    for step in run.steps(cfg.rm_steps):
        rows = shuffled_batch(len(pairs), cfg.rm_batch, step, cfg.seed)
        total, right = 0.0, 0
        lm.activate(role, train=True)
        for start in range(0, len(rows), cfg.micro_batch):
            scores = score_rows(lm, role, [transcripts[row] for row in rows[start : start + cfg.micro_batch]])  # (k, B)
            loss = loss_of(*scores).sum() / len(rows)
            loss.backward()
            total, right = total + loss.item(), right + (scores[0] > scores[-1]).sum().item()
        norm = take_step(optimizer, cfg.rm_lr * (1 - step / cfg.rm_steps))
        run.log(loss=total, accuracy=right / len(rows), grad_norm=norm)


def score_rows(lm, role, rows):
    """Score B rows of k transcripts in one pass -> (k, B)."""
    tokens = lm.collate(*zip(*(transcript for k in range(len(rows[0])) for transcript in (row[k] for row in rows))))
    return lm.scores(role, tokens).view(len(rows[0]), len(rows))


@torch.no_grad()
def score_pairs(lm, role, transcripts_of, pairs, micro_batch):
    """Score every transcript of every pair -> (k, number of pairs), on the CPU."""
    lm.activate(role)
    rows = [transcripts_of(lm, pair) for pair in pairs]
    parts = [score_rows(lm, role, rows[start : start + micro_batch]) for start in range(0, len(rows), micro_batch)]
    return torch.cat(parts, 1).cpu()
