"""The paper's evidence for a run, measured: judges, win / lose / Delta with 95% intervals, rounds, stop rules, gap models.

An answer to each held-out prompt is sampled once for each side (baselines.write_sides), and every comparison looks at the same
answers. Measuring needs the model, and its numbers go to results.json; drawing needs only those, and has a file of its own,
report.py. Besides: the samples that are shown after each stage. Run: python pit.py eval --run runs/tiny, about a minute.
"""

from functools import cache

import numpy as np

import baselines
import infer
import reward
from data import Pair
from judges import SAME
from reward import gap_contexts, pair_gaps, score_pairs

COMPARISONS = [
    ("original", "y_w"),
    ("original", "policy_sft"),
    ("pit", "original"),
    ("self_refine", "original"),
    ("self_refine_sft", "original"),
    ("pit_sft", "original"),
    ("pit_rl0", "original"),
    ("best_of_2", "original"),
    ("best_of_3", "original"),
    ("pit", "self_refine"),
    ("pit", "best_of_2"),
    ("pit", "best_of_3"),
    ("pit", "second_sample"),
    ("pit", "pit_sft"),
    ("pit", "pit_rl0"),
]


# ---- statistics ------------------------------------------------------------------------------------------------------------


def interval(values, resamples=2000, seed=0):
    """The 95% bootstrap interval of the mean of (N,) values, one a prompt or an iteration -> [low, high]."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(
        len(values), size=(resamples, len(values))
    )  # (resamples, N)
    return np.quantile(values[draws].mean(1), [0.025, 0.975]).tolist()


def compare(a, b, margin=SAME, **kwargs):
    """Scores of two sides for the same n prompts -> n, win, lose, tie, delta = win - lose, its 95% interval.

    The interval is a paired bootstrap: prompts are drawn with replacement, and both sides' scores go with their prompt.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    outcome = np.where(np.abs(difference) < margin, 0, np.sign(difference))  # (n,) in {-1, 0, 1}
    shares = {
        name: (outcome == sign).mean().item()
        for name, sign in (("win", 1), ("lose", -1), ("tie", 0))
    }
    return {
        "n": len(outcome),
        **shares,
        "delta": outcome.mean().item(),
        "ci95": interval(outcome, **kwargs),
    }


def elo(scores, margin=SAME, resamples=200, seed=0):
    """Scores of K sides for the same N prompts, (K, N) -> Elo ratings (K,) and their 95% intervals (K, 2); side 0 has 1000.

    A Bradley-Terry fit to all K (K - 1) / 2 comparisons at once, a tie being half a win for both; it has no order of games to
    depend on. By Hunter's MM iterations (2004): p_i <- wins_i / sum_j games_ij / (p_i + p_j). Bootstrap over prompts.
    """
    scores = np.asarray(scores, dtype=float)
    difference = scores[:, None] - scores[None]  # (K, K, N)
    won = np.where(np.abs(difference) < margin, 0.5, difference > 0)  # (K, K, N)
    n = scores.shape[1]
    weights = np.vstack(
        [np.ones(n), np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)]
    )
    # below (S, K, K) and (S, K), for S = 1 + resamples draws of prompts, the first one being the prompts themselves
    wins = (
        np.einsum("sn,ijn->sij", weights, won) + 0.25
    )  # half a game drawn by each two keeps a side that never wins finite
    wins *= 1 - np.eye(len(scores))
    games, p = wins + wins.transpose(0, 2, 1), np.ones((len(weights), len(scores)))
    for _ in range(500):  # far more than it takes
        p = wins.sum(2) / (games / (p[:, :, None] + p[:, None])).sum(2)
        p /= p[:, :1]
    ratings = 1000 + 400 * np.log10(p)
    return ratings[0].tolist(), np.quantile(ratings[1:], [0.025, 0.975], axis=0).T.tolist()


def calibration(gaps, bins=10):
    """(2, n) gaps, of better over worse and the reverse -> expected calibration error of sigma(gap) as a probability."""
    p, better = 1 / (1 + np.exp(-np.concatenate(gaps))), np.repeat([1.0, 0.0], len(gaps[0]))
    which = np.minimum((p * bins).astype(int), bins - 1)
    return float(sum(abs((p - better)[which == k].sum()) for k in range(bins)) / len(p))


# ---- judges ----------------------------------------------------------------------------------------------------------------


def judge_accuracy(judges, pairs, length):
    """How often each judge, and "the longer wins", agree with the annotators of held-out pairs; a tie is half right."""
    both = [
        ([pair.prompt for pair in pairs], [getattr(pair, which) for pair in pairs])
        for which in ("chosen", "rejected")
    ]
    rows = {
        name: compare(*(judge.score(*side) for side in both), judge.margin)
        for name, judge in judges.items()
    }
    rows["the longer wins"] = compare(*([length(text) for text in texts] for _, texts in both))
    return {
        name: {
            "accuracy": row["win"] + row["tie"] / 2,
            "margin": judges[name].margin if name in judges else 0,
        }
        for name, row in rows.items()
    }


# ---- measuring: everything goes to results.json -----------------------------------------------------------------------------


def evaluate(lm, run, pairs, last, judges):
    """Write, judge and compare all sides on held-out pairs -> results.json. judges: Judge by name, the main one first."""
    pairs = pairs[: run.config.eval_n]
    prompts = [pair.prompt for pair in pairs]
    sides, refusal = baselines.write_sides(baselines.Answers(lm, run, prompts), pairs, last)
    print("\r" + " " * 50 + "\r", end="")
    scored = {
        j: {side: judge.score(prompts, side.texts) for side in set(sides.values())}
        for j, judge in judges.items()
    }
    scores = {j: {name: scored[j][side] for name, side in sides.items()} for j in judges}
    main, margin = next(iter(judges)), next(iter(judges.values())).margin
    pit = {side: sides[side].texts for side in ("pit_sft", "pit_rl0", "pit") if side in sides}
    gaps = {
        side: reward.gaps(lm, prompts, texts, sides["original"].texts, run.config)
        for side, texts in pit.items()
    }

    @cache
    def length(text):
        return len(lm.encode_response(text))

    table1 = [
        table1_row(a, b, j, scores[j], judge.margin, sides, length, refusal)
        for j, judge in judges.items()
        for a, b in COMPARISONS
        if "pit_rl0" in sides or "pit_rl0" not in (a, b)  # of one round alone, it is `pit` itself
    ]
    methods = ["pit"] + ["self_refine"] * (refusal is None)
    fig3 = [
        {"method": m, "temperature": T}
        | compare(scores[main][f"{m}@{T}"], scores[main]["original"], margin)
        for m in methods
        for T in baselines.TEMPERATURES
    ]
    run.add_results(
        main=main,
        judges=judge_accuracy(judges, pairs, length),
        fig3=fig3,
        table1=[r for r in table1 if "n" in r],
        not_applicable=[r for r in table1 if "n" not in r],
        mean_score={
            j: {side: float(np.mean(x)) for side, x in by_side.items()}
            for j, by_side in scores.items()
        },
        mean_tokens={
            side: float(np.mean([length(text) for text in s.texts])) for side, s in sides.items()
        },
        cooler=compare(scores[main]["pit@0.4"], scores[main]["pit@1.0"], margin),
        table3=rounds_table(methods, scores[main], margin),
        rl=rl_table(lm, run.config, prompts, sides, gaps),
        stops=stop_table(lm, run.config, prompts, sides, scores[main], gaps["pit"]),
        **gap_evidence(lm, run.config, pairs, written_pairs(prompts, sides, scores[main], margin)),
    )


def table1_row(a, b, judge, scores, margin, sides, length, refusal):
    """One line of Table 1: who wins, how long both sides' answers are, and what one final answer of `a` cost."""
    if a not in sides or b not in sides:
        return {"a": a, "b": b, "judge": judge, "not_applicable": refusal}
    tokens = {
        f"tokens_{x}": float(np.mean([length(text) for text in sides[side].texts]))
        for x, side in (("a", a), ("b", b))
    }
    spent = {
        "generated_tokens": float(np.mean(sides[a].tokens)),
        "generations": sides[a].generations,
    }
    return {"a": a, "b": b, "judge": judge} | compare(scores[a], scores[b], margin) | tokens | spent


def rounds_table(methods, scores, margin):
    """Table 3: the original and every round of each method -> Elo, mean score, Delta over the original, all with intervals."""
    players = ["original"] + [f"{m}#{k}" for m in methods for k in range(1, baselines.ROUNDS + 1)]
    ratings, intervals = elo([scores[player] for player in players], margin)
    rows = []
    for player, rating, ends in zip(players, ratings, intervals):
        method, _, k = player.partition("#")
        rows.append(
            {
                "method": method,
                "round": int(k or 0),
                "elo": rating,
                "elo_ci95": ends,
                "mean": float(scores[player].mean()),
                "mean_ci95": interval(scores[player]),
                "over_original": compare(scores[player], scores["original"], margin),
            }
        )
        if k and method == "pit" and f"self_refine#{k}" in scores:
            rows[-1]["over_self_refine"] = compare(
                scores[player], scores[f"self_refine#{k}"], margin
            )
    return rows


def rl_table(lm, cfg, prompts, sides, gaps):
    """What each RL stage did to its own reward: its mean on the held-out prompts before and after, and the rise's interval.

    gaps: of the answers of PIT after SFT and after each round that has a side, over the original -> (N,) by side, in order.
    """
    rewards = {
        s: reward.rewards(lm, "reward_policy", prompts, sides[s].texts, cfg)
        for s in ("policy_sft", "original")
    } | gaps
    pit = list(gaps)
    stages = [("policy_sft", "original", "R_P")] + [
        (before, after, "gap by R_PIT") for before, after in zip(pit, pit[1:])
    ]
    return [
        {
            "before": before,
            "after": after,
            "by": by,
            "start": float(rewards[before].mean()),
            "end": float(rewards[after].mean()),
            "ci95": interval(rewards[after] - rewards[before]),
        }
        for before, after, by in stages
    ]


def stop_table(lm, cfg, prompts, sides, scores, first_gaps):
    """Each stop rule on the same five rounds of PIT, cut short at each limit -> mean score and tokens spent.

    For "time" the limit is the time of that many average rounds; time goes with the tokens written, whatever the machine.
    first_gaps: of the first round over the original, (N,).
    """
    names = ["original"] + [f"pit#{k}" for k in range(1, baselines.ROUNDS + 1)]
    texts, tokens = (
        [sides[name].texts for name in names],
        np.array([sides[name].tokens for name in names]),
    )  # (K + 1, N)
    later = [reward.gaps(lm, prompts, new, old, cfg) for old, new in zip(texts[1:], texts[2:])]
    gaps = [gap.numpy() for gap in (first_gaps, *later)]
    a_round = float((tokens[-1] - tokens[0]).mean()) / baselines.ROUNDS
    rows = []
    for stop in infer.STOPS:
        for limit in range(1, baselines.ROUNDS + 1):
            final, spent = [], []
            for i in range(len(prompts)):
                versions = [
                    text[i] for text in texts[: 1 + (baselines.ROUNDS if stop == "time" else limit)]
                ]
                seconds = tokens[:, i] - tokens[0, i]
                answer, k = infer.end_of(
                    stop, versions, [gap[i] for gap in gaps], seconds, limit * a_round
                )
                final.append(scores[names[answer]][i])
                spent.append(tokens[k, i])
            rows.append(
                {
                    "stop": stop,
                    "limit": limit,
                    "mean": float(np.mean(final)),
                    "ci95": interval(final),
                    "tokens": float(np.mean(spent)),
                }
            )
    return rows


def written_pairs(prompts, sides, scores, margin):
    """PIT's answer and the original as preference pairs, by the main judge; ties are left out."""
    rows = zip(
        prompts, sides["pit"].texts, sides["original"].texts, scores["pit"] - scores["original"]
    )
    return [
        Pair(x, a, b) if a_over_b > 0 else Pair(x, b, a)
        for x, a, b, a_over_b in rows
        if abs(a_over_b) >= margin
    ]


GAP_MODELS = {
    "reward_gap": "R_PIT, Eq. 2 centred",
    "reward_policy": "R_P(y) - R_P(y_ref)",
    "reward_gap2": "Eq. 2 as published",
    "reward_gap3": "Eq. 2, first three terms",
}


def gap_evidence(lm, cfg, annotated, written):
    """Fig. 2's four distributions, and accuracy and calibration of every gap model there is, on both kinds of pairs."""
    fig2, eq2 = {}, []
    for kind, pairs in (("annotated", annotated), ("written by models", written)):
        if not pairs:
            continue
        four = score_pairs(lm, "reward_gap", gap_contexts, pairs, cfg.micro_batch)
        fig2[kind] = {
            name: [round(x, 3) for x in row.tolist()]
            for name, row in zip(("ww", "lw", "wl", "ll"), four)
        }
        for role in GAP_MODELS:
            if role in lm.roles:
                gaps = pair_gaps(lm, role, pairs, cfg.micro_batch).numpy()
                right = (
                    (gaps[0] > 0) * 1.0 + (gaps[1] < 0)
                ) / 2  # is the sign right, in both directions?
                eq2.append(
                    {
                        "model": role,
                        "pairs": kind,
                        "n": len(pairs),
                        "accuracy": float(right.mean()),
                        "ci95": interval(right),
                        "calibration_error": calibration(gaps),
                    }
                )
    return {"fig2": fig2, "eq2": eq2}


def judge_curricula(lm, run, pairs, lasts, judges):
    """Table 2: every curriculum's last adapter (lasts: curriculum -> role) improves the same originals -> results.json."""
    pairs = pairs[: run.config.eval_n]
    prompts, (name, judge) = [pair.prompt for pair in pairs], next(iter(judges.items()))
    answers = baselines.Answers(lm, run, prompts)
    original = answers.write("original", "policy_rl", prompts)
    before = judge.score(prompts, original.texts)
    after = {
        c: judge.score(prompts, answers.improve(role, role, original).texts)
        for c, role in lasts.items()
    }
    print("\r" + " " * 50 + "\r", end="")
    both = after["annotated,policy"]
    rows = [
        {
            "curriculum": c,
            "judge": name,
            "over_original": compare(x, before, judge.margin),
            "both_over_it": compare(both, x, judge.margin),
        }
        for c, x in after.items()
    ]
    run.add_results(table2=rows, lasts=lasts)
