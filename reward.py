"""Stage 2, reward models: learn from pairs what better means, as a score and as a gap.

R_P      r(x, y)            how good y is.                   Bradley-Terry: - sum log sigma(r(x, y_w) - r(x, y_l))
R_PIT    r(x, y, y_ref)     how much better y is than y_ref. Eq. 2, over five comparisons, and a term of our own, below

R_P reads the turns (x, y); R_PIT reads (x, y_ref, "Please improve ...", y), token for token what M_P and M_PIT read and write.
So "score" always means: read the transcript, and take the scalar head's output at the last token.

R_P and the judge start from the base, not from M_P^SFT: on the built-in task, a policy that was taught to write y_w, flaws
included, had lost much of the base's eye for flaws. R_PIT starts from R_P.
"""

import torch
import torch.nn.functional as F

from data import improve_prompt
from errors import finite
from models import adamw, take_step
from run import shuffled_batch
from tokens import in_parts, micro_batches

CENTRE = 0.01  # of (r^ww)^2 + (r^ll)^2; the weight that TRL recommends for centring scores (Eisenstein et al., 2023, Eq. 2)
WARMUP = 0.2  # share of the steps; Adam's first steps, at full size, would throw over what R_PIT has from R_P


def bradley_terry(chosen, rejected):
    """- log sigma(r_w - r_l) of each pair; both arguments and the result (B,). log 2 at a tie."""
    return -F.logsigmoid(chosen - rejected)


def gap_loss(ww, lw, wl, ll):
    """Eq. 2 of each pair: -log sigma over the five comparisons of Eq. 1, r^wl >= r^ww ~ r^ll >= r^lw; all (B,)."""
    return three_terms(ww, lw, wl, ll) + bradley_terry(ww, lw) + bradley_terry(ll, lw)


def centred_gap_loss(ww, lw, wl, ll):
    """Eq. 2, and our own addition: "no change" is worth 0; all (B,).

    Eq. 1 wants r^ww ~ r^ll, yet no term of Eq. 2 compares the two. Each is pulled down against r^wl and up against r^lw, and is
    at rest halfway. But once r^wl and r^lw are far apart these pulls fade, and where r^ww and r^ll end is left to chance.
    """
    return gap_loss(ww, lw, wl, ll) + CENTRE * (ww**2 + ll**2)


def three_terms(ww, lw, wl, ll):
    """The first three terms of Eq. 2, as an ablation: w after l is best, but nothing says that l after w is worst."""
    return sum(bradley_terry(wl, worse) for worse in (ww, ll, lw))


def answer_contexts(lm, pair):
    """What R_P reads before y: x -> a list of one, of token ids."""
    return [lm.encode_prompt(pair.prompt)]


def gap_contexts(lm, pair):
    """What R_PIT reads before y: (x, y_ref) for y_ref = y_w and y_l -> a list of two, of token ids."""
    return [lm.encode_prompt(improve_prompt(pair.prompt, y_ref)) for y_ref in (pair.chosen, pair.rejected)]


def train_policy_reward(lm, run, pairs, held_out, role="reward_policy"):
    """A Bradley-Terry model of single answers -> adapter and head `role`: R_P from D_RM, the judge from pairs of its own."""
    train(lm, run, role, "blank", answer_contexts, bradley_terry, pairs)
    chosen, rejected = score_pairs(lm, role, answer_contexts, held_out, run.config.micro_batch)
    finish(lm, run, role, {"accuracy": (chosen > rejected).float().mean().item()}, len(chosen))


def train_gap_reward(lm, run, pairs, held_out, role="reward_gap", loss_of=centred_gap_loss):
    """R_PIT from D_RM -> adapter and head `role`."""
    train(lm, run, role, "reward_policy", gap_contexts, loss_of, pairs)
    ww, lw, wl, ll = score_pairs(lm, role, gap_contexts, held_out, run.config.micro_batch)
    no_change = torch.cat([ww, ll])
    measured = {
        "accuracy": torch.cat([wl > ll, lw < ww]).float().mean().item(),  # is the sign of the gap right?
        "order": ((wl > ww) & (wl > ll) & (ww > lw) & (ll > lw)).float().mean().item(),  # Eq. 1 in full
        "no_change": no_change.mean().item(),
        "no_change_std": no_change.std().item(),
        "middle": ((ww - ll).mean() / (wl - lw).mean()).item(),  # distance of the two middles, as a share of the outer gap
        **{f"mean_{name}": (r - no_change.mean()).mean().item() for name, r in dict(wl=wl, ww=ww, ll=ll, lw=lw).items()},
    }
    finish(lm, run, role, measured, 2 * len(ww))


@torch.no_grad()
def scores(lm, role, tokens, micro_batch):
    """What reward model `role` gives to each response of `tokens` -> (B,)."""
    lm.activate(role)
    return in_parts(lambda part: lm.scores(role, part), tokens, micro_batch)


def gap(lm, changed, prompts, references, micro_batch):
    """How much better than y_ref is y?   gap(y, y_ref) = r(x, y, y_ref) - r(x, y_ref, y_ref)   -> (B,)

    changed: r(x, y, y_ref), (B,). prompts, (x, y_ref), and references: lists of B lists of token ids. The value of
    "no change", r(x, y_ref, y_ref), is near 0 on average alone. Measured against it, a gap of 0 is no change, for each y_ref.
    """
    return changed - scores(lm, "reward_gap", lm.collate(prompts, references), micro_batch)


def finish(lm, run, role, measured, n):
    """Print, store and save; n is the number of comparisons behind the accuracy."""
    if measured["accuracy"] < 0.5 + n**-0.5:  # two standard errors
        run.warn(f"{role} is no better than chance. Try more --rm-steps, more --pairs, another --rm-lr.")
    run.add_results(reward=run.results().get("reward", {}) | {role: measured})
    short = {name: value for name, value in measured.items() if not name.startswith("mean_")}
    print("  held out: " + "  ".join(f"{name} {value:.2f}" for name, value in short.items()))
    with run.new_adapter(role) as folder:
        lm.save(role, folder)


def train(lm, run, role, start, contexts_of, loss_of, pairs):
    """Minimise loss_of(the scores of y_w and y_l in the first context, in the second ...) from adapter `start` on."""
    cfg = run.config
    lm.add(role, like=start, head=True)
    optimizer = adamw(lm.parameters(role), cfg.rm_lr)
    for step in run.steps(cfg.rm_steps, [optimizer]):
        batch = [pairs[row] for row in shuffled_batch(len(pairs), cfg.rm_batch, step, cfg.seed)]
        total, right = 0.0, 0
        lm.activate(role, train=True)
        for some in micro_batches(batch, cfg.micro_batch, lambda pair: len(pair.key())):
            by_candidate = score_batch(lm, role, contexts_of, some)
            loss = loss_of(*by_candidate).sum() / len(batch)
            loss.backward()
            right += (by_candidate[0::2] > by_candidate[1::2]).float().mean(0).sum().item()  # y_w above y_l, in each context
            total += loss.item()
        finite("Lower --rm-lr, or look for odd texts in the data.", loss=total)
        done = step / cfg.rm_steps
        norm = take_step(optimizer, cfg.rm_lr * min(1, (done + 1 / cfg.rm_steps) / WARMUP) * (1 - done))
        run.log(loss=total, accuracy=right / len(batch), grad_norm=norm)


def score_batch(lm, role, contexts_of, pairs):
    """Score y_w and y_l after each of the c contexts of a pair -> (2c, B).

    One context, x: the rows are w, l. Two, (x, y_w) and (x, y_l): ww, lw, wl, ll, the candidate's letter first.
    """
    contexts = [contexts_of(lm, pair) for pair in pairs]
    candidates = [[lm.encode_response(pair.chosen), lm.encode_response(pair.rejected)] for pair in pairs]
    by_context = [lm.scores_of_candidates(role, prompts, candidates).T for prompts in zip(*contexts)]  # (2, B) each
    return torch.cat(by_context)


@torch.no_grad()
def score_pairs(lm, role, contexts_of, pairs, micro_batch):
    """`score_batch` of any number of pairs, without gradients -> (2c, number of pairs), on the CPU."""
    lm.activate(role)
    parts = [pairs[at : at + micro_batch] for at in range(0, len(pairs), micro_batch)]
    return torch.cat([score_batch(lm, role, contexts_of, part) for part in parts], 1).cpu()


def pair_gaps(lm, role, pairs, micro_batch):
    """The gap of y_w over y_l and of y_l over y_w, "no change" of the same reference being 0 -> (2, number of pairs).

    By a gap model r(x, y, y_ref) - r(x, y_ref, y_ref); by R_P, which reads no reference, R_P(y) - R_P(y_ref).
    """
    if role == "reward_policy":
        chosen, rejected = score_pairs(lm, role, answer_contexts, pairs, micro_batch)
        return torch.stack([chosen - rejected, rejected - chosen])
    ww, lw, wl, ll = score_pairs(lm, role, gap_contexts, pairs, micro_batch)
    return torch.stack([wl - ll, lw - ww])
