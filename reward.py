"""Stage 2, reward models: learn from pairs what better means, as a score and as a gap.

R_P      r(x, y)          how good is y?                      - sum log sigma(r(x, y_w) - r(x, y_l))
R_PIT    r(x, y, y_ref)   how much better is y than y_ref?    Eq. 2, and a term of our own

R_P reads the turns (x, y). R_PIT reads (x, y_ref, "Please improve ...", y), token for token what
M_PIT reads and writes. So "score" always means: read the transcript, and take the scalar head's
output at the last token.

R_P and the judge start from the base, not from M_P^SFT: on the built-in task, a policy that had
learned to write y_w, flaws included, saw fewer flaws than the base. R_PIT starts from R_P.

Run: python pit.py reward --run runs/tiny (a run that `all` has begun), a minute or two. On held-out
pairs R_P is right on 96%, R_PIT on 96% of its comparisons.
"""

import torch
import torch.nn.functional as F

from data import improve_prompt
from models import adamw, take_step
from run import shuffled_batch
from tokens import in_parts, micro_batches

# weight of (r^ww)^2 + (r^ll)^2. TRL recommends 0.01 for its own centring term, (r_w + r_l)^2, from
# Eisenstein et al. (2023, Eq. 2)
CENTRE = 0.01
# share of the steps: Adam's first steps at full size would undo what R_PIT took over from R_P;
# R_P and the judge, whose heads are random at first, warm up, too
WARMUP = 0.2


# ---- the losses: pure functions of scores, all (B,) --------------------------------------------


def bradley_terry(chosen, rejected):
    """-log sigma(r_w - r_l) of each pair -> (B,). log 2 at a tie.

    A shift that all scores share changes nothing, so the zero of R_P is arbitrary: the head's bias
    moves by rounding alone. Compare scores; never read one on its own.
    """
    return -F.logsigmoid(chosen - rejected)


def gap_loss(ww, lw, wl, ll):
    """Eq. 2 of each pair -> (B,): -log sigma over the five comparisons of Eq. 1.

    Eq. 1: r^wl >= r^ww ~ r^ll >= r^lw, the candidate's letter first. Unlike with Bradley-Terry,
    sigma(r^wl - r^ll) is not the probability that y_w is preferred: where 80% of annotators prefer
    it, the loss is lowest at 0.75 (with r^ww = r^ll, halfway between r^wl and r^lw).
    """
    return three_terms(ww, lw, wl, ll) + bradley_terry(ww, lw) + bradley_terry(ll, lw)


def centred_gap_loss(ww, lw, wl, ll):
    """Eq. 2, and an addition of our own: "no change" is worth 0 -> (B,).

    Eq. 1 wants r^ww ~ r^ll, yet no term of Eq. 2 compares the two. Each is pulled down against
    r^wl and up against r^lw, and rests halfway. But once r^wl and r^lw are far apart these pulls
    fade, and where r^ww and r^ll end is left to chance.
    """
    return gap_loss(ww, lw, wl, ll) + CENTRE * (ww**2 + ll**2)


def three_terms(ww, lw, wl, ll):
    """The first three terms of Eq. 2, as an ablation -> (B,).

    w after l is best, but nothing says that l after w is worst.
    """
    return sum(bradley_terry(wl, worse) for worse in (ww, ll, lw))


# ---- training ----------------------------------------------------------------------------------


def train_policy_reward(lm, run, pairs, held_out, role="reward_policy"):
    """A Bradley-Terry model of single answers -> adapter and head `role`.

    R_P from D_RM; the judge from a separate part of the data.
    """
    if run.load_trained(lm, role):
        return
    why = "R_P, how good is an answer? (Bradley-Terry)"
    if role != "reward_policy":
        why = "a judge for the tables, on separate pairs"
    with run.stage(role, why):
        lm.add(role, like="blank", head=True)
        train(lm, run, role, pairs, contexts_of=answer_contexts, loss_of=bradley_terry)
        finish(lm, run, role, answer_contexts, held_out)


def train_gap_reward(lm, run, pairs, held_out, role="reward_gap", loss_of=centred_gap_loss):
    """R_PIT from D_RM -> adapter and head `role`."""
    if run.load_trained(lm, role):
        return
    with run.stage(role, f"R_PIT, how much better than y_ref? ({loss_of.__name__})"):
        lm.add(role, like="reward_policy", head=True)
        train(lm, run, role, pairs, contexts_of=gap_contexts, loss_of=loss_of)
        finish(lm, run, role, gap_contexts, held_out)


def train(lm, run, role, pairs, *, contexts_of, loss_of):
    """Minimise loss_of(w, l) for R_P, loss_of(ww, lw, wl, ll) for R_PIT, on `role`."""
    cfg = run.config
    optimizer = adamw(lm.parameters(role), cfg.rm_lr)
    for step in run.steps(cfg.rm_steps, [optimizer]):
        batch = shuffled_batch(pairs, cfg.rm_batch, step, cfg.seed)
        # gradients add up over micro-batches
        lm.activate(role, train=True)
        total = right = 0.0
        for part in micro_batches(batch, cfg.micro_batch, pair_length):
            scores = score_batch(lm, contexts_of, part, cfg)  # (c, 2, B)
            # w, l for R_P; ww, lw, wl, ll for R_PIT, the candidate first
            loss = loss_of(*scores.flatten(0, 1)).sum() / len(batch)
            loss.backward()
            total += loss.detach()
            right += ranked_right(scores).float().mean(0).sum()
        # warm up while decaying linearly to 0: the highest rate is about 0.8 rm_lr
        done = step / cfg.rm_steps
        warm = min(1, (done + 1 / cfg.rm_steps) / WARMUP)
        norm = take_step(optimizer, cfg.rm_lr * warm * (1 - done))
        run.log(loss=total, accuracy=right / len(batch), grad_norm=norm)


def pair_length(pair):
    """In characters, which track tokens well enough for sorting."""
    return len(pair.key())


def ranked_right(scores):
    """Is y_w above y_l, in each of the c contexts? Scores by `score_batch`, (c, 2, B) -> (c, B)."""
    return scores[:, 0] > scores[:, 1]


def held_out_metrics(scores):
    """What the scores of N held-out pairs show, (c, 2, N) as in `score_batch` -> dict.

    accuracy           share of comparisons with y_w above y_l
    and for R_PIT alone:
    order              share of pairs whose scores keep the order of Eq. 1 in full
    middle             r^ww - r^ll as a share of r^wl - r^lw, means over the pairs
    no_change          mean of r^ww and r^ll, the scores of "no change"
    no_change_std      their standard deviation
    """
    measured = {"accuracy": ranked_right(scores).float().mean()}
    if len(scores) == 2:
        (ww, lw), (wl, ll) = scores
        in_order = (wl > ww) & (wl > ll) & (ww > lw) & (ll > lw)  # Eq. 1, but for ww ~ ll: `middle`
        no_change = torch.cat([ww, ll])
        measured |= dict(
            order=in_order.float().mean(),
            middle=(ww - ll).mean() / (wl - lw).mean(),
            no_change=no_change.mean(),
            no_change_std=no_change.std(),
        )
    return {name: value.item() for name, value in measured.items()}


def finish(lm, run, role, contexts_of, held_out):
    """Measure on held-out pairs, print, store and save."""
    measured = held_out_metrics(score_pairs(lm, role, contexts_of, held_out, run.config))
    n = len(held_out)
    two_standard_errors = n**-0.5  # 2 sqrt(0.5 * 0.5 / n)
    if measured["accuracy"] < 0.5 + two_standard_errors:
        run.warn(f"{role} may be no better than chance on {n} pairs. More --rm-steps, or --pairs?")
    run.add_results(reward=run.results().get("reward", {}) | {role: measured})
    print(f"  held out: right on {measured['accuracy']:.0%}")
    if "order" in measured:
        no_change = f"{measured['no_change']:.2f} +- {measured['no_change_std']:.2f}"
        print(f"  Eq. 1 in full on {measured['order']:.0%}; 'no change' is worth {no_change}")
    run.keep(lm, role)


# ---- scores of pairs: what the losses see ------------------------------------------------------


def answer_contexts(lm, pair):
    """What R_P reads before y: x -> a list of one, of token ids."""
    return [lm.encode_prompt(pair.prompt)]


def gap_contexts(lm, pair):
    """What R_PIT reads before y: (x, y_w) and (x, y_l) -> a list of two, of token ids."""
    return [
        lm.encode_prompt(improve_prompt(pair.prompt, pair.chosen)),
        lm.encode_prompt(improve_prompt(pair.prompt, pair.rejected)),
    ]


def score_batch(lm, contexts_of, pairs, cfg):
    """The active model's scores of y_w and y_l after each of the c contexts of a pair -> (c, 2, B).

    One context, x: [[w, l]]. Two, (x, y_w) and (x, y_l): [[ww, lw], [wl, ll]].
    """
    # both answers of a pair share a row with their context where the model allows it
    contexts = [contexts_of(lm, pair) for pair in pairs]
    candidates = [
        [encode_written(lm, pair.chosen, cfg), encode_written(lm, pair.rejected, cfg)]
        for pair in pairs
    ]
    # (2, B) for each context
    scores = [lm.scores_of_candidates(prompts, candidates).T for prompts in zip(*contexts)]
    return torch.stack(scores)


@torch.no_grad()
def score_pairs(lm, role, contexts_of, pairs, cfg):
    """`score_batch` of any number N of pairs, without gradients -> (c, 2, N) on the CPU."""
    lm.activate(role)
    parts = micro_batches(pairs, cfg.micro_batch)
    scores = [score_batch(lm, contexts_of, part, cfg) for part in parts]
    return torch.cat(scores, dim=-1).cpu()


# ---- scores of texts: what RL, evaluation and `infer` see --------------------------------------


def encode_written(lm, text, cfg):
    """An answer as its writer left it -> token ids.

    One that fills max_response was cut off, and has no EOS: RL rates it so, and so does evaluation.
    (Text can come back as other tokens than were sampled: a few cut-off answers end up one token
    shorter, and get an EOS. Other special tokens are gone. Where the tokenizer's own EOS is another
    token, so is all text after it.)
    """
    return lm.encode_response(text)[: cfg.max_response]


@torch.no_grad()
def rewards(lm, role, prompts, answers, cfg):
    """What reward model `role` says of each answer (chats and texts) -> (N,)."""
    lm.activate(role)
    prompts = [lm.encode_prompt(x) for x in prompts]
    answers = [encode_written(lm, text, cfg) for text in answers]
    tokens = lm.collate(prompts, answers)
    return in_parts(lm.scores, tokens, cfg.micro_batch)


def gaps(lm, prompts, answers, references, cfg):
    """How much better is each answer than its reference? By R_PIT -> (N,)

        gap(y, y_ref) = r(x, y, y_ref) - r(x, y_ref, y_ref)

    The score of "no change" is near 0 only on average. Measured against that score, a gap of 0
    means "no change" for every y_ref.
    """
    chats = list(map(improve_prompt, prompts, references))
    changed = rewards(lm, "reward_gap", chats, answers, cfg)
    unchanged = rewards(lm, "reward_gap", chats, references, cfg)
    return changed - unchanged
