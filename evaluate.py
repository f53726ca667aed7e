"""The paper's evidence for a run: judges, win / lose / Delta with 95% intervals, tables, figures, a scorecard, the report.

An answer to each held-out prompt is sampled once for each side (infer.write_sides), and every comparison looks at the same
answers. Everything that is measured goes to results.json first; report.md and its figures are made from there alone.
"""

from collections.abc import Callable
from dataclasses import dataclass
from textwrap import shorten

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import infer
from data import Pair, quality
from reward import gap_contexts, pair_gaps, score_pairs
from run import UserError, seed_all, write_text

SAME = 1e-4  # exact scores closer than this are a tie
NEAR = 0.1  # learned scores are log-odds: closer than this is a tie, a preference of less than 52.5 to 47.5
COMPARISONS = [("original", "y_w"), ("pit", "original"), ("self_refine", "original"), ("self_refine_sft", "original"),
               ("pit_sft", "original"), ("pit_rl0", "original"), ("best_of_2", "original"), ("best_of_3", "original"),
               ("pit", "self_refine"), ("pit", "best_of_2"), ("pit", "best_of_3"), ("pit", "second_sample"),
               ("pit", "pit_sft"), ("pit", "pit_rl0")]  # fmt: skip
BLUE, ORANGE, GREEN, RED, PINK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
)  # Okabe and Ito: safe for the colour-blind
plt.rcParams.update({
    "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PINK]), "axes.grid": True, "grid.alpha": 0.3,
    "figure.facecolor": "white", "figure.constrained_layout.use": True, "savefig.dpi": 100, "errorbar.capsize": 3,
})  # fmt: skip


# ---- statistics ------------------------------------------------------------------------------------------------------------


def interval(values, resamples=2000, seed=0):
    """The 95% bootstrap interval of the mean of (N,) values, one a prompt -> [low, high]."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    return np.quantile(values[draws].mean(1), [0.025, 0.975]).tolist()


def compare(a, b, margin=SAME, **kwargs):
    """Scores of two sides for the same n prompts -> n, win, lose, tie, delta = win - lose, its 95% interval.

    The interval is a paired bootstrap: prompts are drawn with replacement, and both sides' scores go with their prompt.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    outcome = np.where(np.abs(difference) < margin, 0, np.sign(difference))  # (n,) in {-1, 0, 1}
    shares = {name: (outcome == sign).mean().item() for name, sign in (("win", 1), ("lose", -1), ("tie", 0))}
    return {"n": len(outcome), **shares, "delta": outcome.mean().item(), "ci95": interval(outcome, **kwargs)}


def elo(scores, margin=SAME, resamples=200, seed=0):
    """Scores of K sides for the same N prompts, (K, N) -> Elo ratings (K,) and their 95% intervals (K, 2); side 0 has 1000.

    A Bradley-Terry fit to all K (K - 1) / 2 comparisons at once, a tie being half a win for both; it has no order of games to
    depend on. By Hunter's MM iterations (2004): p_i <- wins_i / sum_j games_ij / (p_i + p_j). Bootstrap over prompts.
    """
    scores = np.asarray(scores, dtype=float)
    difference = scores[:, None] - scores[None]  # (K, K, N)
    won = np.where(np.abs(difference) < margin, 0.5, difference > 0)
    n = scores.shape[1]
    weights = np.vstack([np.ones(n), np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)])
    wins = np.einsum("sn,ijn->sij", weights, won) + 0.25  # half a game drawn by each two keeps a side that never wins finite
    wins *= 1 - np.eye(len(scores))
    games, p = wins + wins.transpose(0, 2, 1), np.ones((len(weights), len(scores)))
    for _ in range(500):
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


@dataclass
class Judge:
    """score(prompts, texts) -> (N,) numbers, larger for better; closer than `margin` is a tie."""

    score: Callable
    margin: float = NEAR


def exact(prompts, texts):
    return np.array([quality(prompt[-1]["content"], text) for prompt, text in zip(prompts, texts)])


def adapter_judge(lm, role, cfg):
    """A Bradley-Terry judge: an adapter with a head on this base or another."""
    return Judge(lambda prompts, texts: infer.rewards(lm, role, prompts, texts, cfg).numpy())


def hub_judge(name, device):
    """A sequence-classification reward model, by hub id or folder; it reads its own chat template, or prompt and answer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True).to(device).eval()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--judge {name}: {reason}\nGive quality, judge, or a reward model by folder or hub id.") from None
    if model.config.num_labels != 1:
        raise UserError(f"--judge {name}: a reward model has one output, this one has {model.config.num_labels}.")

    @torch.no_grad()
    def score(prompts, texts):
        scores = []
        for prompt, text in zip(prompts, texts):  # one by one: not all such models know their padding
            if tokenizer.chat_template:
                chat = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
                inputs = tokenizer(chat, add_special_tokens=False, return_tensors="pt")
            else:
                inputs = tokenizer("\n\n".join(turn["content"] for turn in prompt), text, return_tensors="pt")
            scores.append(model(**inputs.to(device)).logits.float().item())
        return np.array(scores)

    return Judge(score)


def judge_accuracy(judges, pairs, length):
    """How often each judge, and "the longer wins", agree with the annotators of held-out pairs; a tie is half right."""
    both = [([pair.prompt for pair in pairs], [getattr(pair, which) for pair in pairs]) for which in ("chosen", "rejected")]
    rows = {name: compare(*(judge.score(*side) for side in both), judge.margin) for name, judge in judges.items()}
    rows["the longer wins"] = compare(*([length(text) for text in texts] for _, texts in both))
    return {
        name: {"accuracy": row["win"] + row["tie"] / 2, "margin": judges[name].margin if name in judges else 0}
        for name, row in rows.items()
    }


# ---- measuring: everything goes to results.json ------------------------------------------------------------------------------


def evaluate(lm, run, pairs, last, judges):
    """Write, judge and compare all sides on held-out pairs -> results.json. judges: Judge by name, the main one first."""
    pairs = pairs[: run.config.eval_n]
    prompts = [pair.prompt for pair in pairs]
    sides, refusal = infer.write_sides(infer.Answers(lm, run, prompts), pairs, last)
    print("\r" + " " * 50 + "\r", end="")
    scores = {j: {side: judge.score(prompts, s.texts) for side, s in sides.items()} for j, judge in judges.items()}
    main, margin = next(iter(judges)), next(iter(judges.values())).margin

    def length(text):
        return len(lm.encode_response(text))

    table1 = [
        table1_row(a, b, j, scores[j], judge.margin, sides, length, refusal)
        for j, judge in judges.items()
        for a, b in COMPARISONS
    ]
    methods = ["pit"] + ["self_refine"] * (refusal is None)
    fig3 = [
        {"method": m, "temperature": T} | compare(scores[main][f"{m}@{T}"], scores[main]["original"], margin)
        for m in methods
        for T in infer.TEMPERATURES
    ]
    run.add_results(
        main=main, judges=judge_accuracy(judges, pairs, length), fig3=fig3,
        table1=[r for r in table1 if "n" in r], not_applicable=[r for r in table1 if "n" not in r],
        mean_score={j: {side: float(np.mean(x)) for side, x in by_side.items()} for j, by_side in scores.items()},
        mean_tokens={side: float(np.mean([length(text) for text in s.texts])) for side, s in sides.items()},
        cooler=compare(scores[main]["pit@0.4"], scores[main]["pit@1.0"], margin),
        table3=rounds_table(methods, scores[main], margin),
        stops=stop_table(lm, run.config, prompts, sides, scores[main]),
        **gap_evidence(lm, run.config, pairs, written_pairs(prompts, sides, scores[main], margin)),
    )  # fmt: skip
    print(table(table1))


def table1_row(a, b, judge, scores, margin, sides, length, refusal):
    """One line of Table 1: who wins, how long both sides' answers are, and what one final answer of `a` cost."""
    if a not in sides or b not in sides:
        return {"a": a, "b": b, "judge": judge, "not_applicable": refusal}
    tokens = {f"tokens_{x}": float(np.mean([length(text) for text in sides[side].texts])) for x, side in (("a", a), ("b", b))}
    spent = {"generated_tokens": float(np.mean(sides[a].tokens)), "generations": sides[a].generations}
    return {"a": a, "b": b, "judge": judge} | compare(scores[a], scores[b], margin) | tokens | spent


def rounds_table(methods, scores, margin):
    """Table 3: the original and every round of each method -> Elo, mean score, Delta over the original, all with intervals."""
    players = ["original"] + [f"{m}#{k}" for m in methods for k in range(1, infer.ROUNDS + 1)]
    ratings, intervals = elo([scores[player] for player in players], margin)
    rows = []
    for player, rating, ends in zip(players, ratings, intervals):
        method, _, k = player.partition("#")
        rows.append({
            "method": method, "round": int(k or 0), "elo": rating, "elo_ci95": ends, "mean": float(scores[player].mean()),
            "mean_ci95": interval(scores[player]), "over_original": compare(scores[player], scores["original"], margin),
        })  # fmt: skip
        if k and method == "pit" and f"self_refine#{k}" in scores:
            rows[-1]["over_self_refine"] = compare(scores[player], scores[f"self_refine#{k}"], margin)
    return rows


def stop_table(lm, cfg, prompts, sides, scores):
    """Each stop rule on the same five rounds of PIT, cut short at each limit -> mean score and tokens spent.

    For "time" the limit is the time of that many average rounds; time goes with the tokens written, whatever the machine.
    """
    names = ["original"] + [f"pit#{k}" for k in range(1, infer.ROUNDS + 1)]
    texts, tokens = [sides[name].texts for name in names], np.array([sides[name].tokens for name in names])  # (K + 1, N)
    gaps = [infer.gaps(lm, prompts, new, old, cfg).numpy() for old, new in zip(texts, texts[1:])]
    a_round = float((tokens[-1] - tokens[0]).mean()) / infer.ROUNDS
    rows = []
    for stop in infer.STOPS:
        for limit in range(1, infer.ROUNDS + 1):
            final, spent = [], []
            for i in range(len(prompts)):
                for k in range(1, (infer.ROUNDS if stop == "time" else limit) + 1):
                    seconds = tokens[k][i] - tokens[0][i]
                    then = infer.after_round(stop, texts[k - 1][i], texts[k][i], gaps[k - 1][i], seconds, limit * a_round)
                    if then != "next":
                        break
                final.append(scores[names[k - 1 if then == "back" else k]][i])
                spent.append(tokens[k][i])
            rows.append({"stop": stop, "limit": limit, "mean": float(np.mean(final)), "ci95": interval(final),
                         "tokens": float(np.mean(spent))})  # fmt: skip
    return rows


def written_pairs(prompts, sides, scores, margin):
    """PIT's answer and the original as preference pairs, by the main judge; ties are left out."""
    pairs = []
    for prompt, a, b, difference in zip(
        prompts, sides["pit"].texts, sides["original"].texts, scores["pit"] - scores["original"]
    ):
        if abs(difference) >= margin:
            pairs.append(Pair(prompt, a, b) if difference > 0 else Pair(prompt, b, a))
    return pairs


GAP_MODELS = {"reward_gap": "R_PIT, Eq. 2", "reward_policy": "R_P(y) - R_P(y_ref)", "reward_gap3": "Eq. 2, first three terms"}


def gap_evidence(lm, cfg, annotated, written):
    """Fig. 2's four distributions, and accuracy and calibration of every gap model there is, on both kinds of pairs."""
    fig2, eq2 = {}, []
    for kind, pairs in (("annotated", annotated), ("written by models", written)):
        if not pairs:
            continue
        four = score_pairs(lm, "reward_gap", gap_contexts, pairs, cfg.micro_batch)
        fig2[kind] = {name: [round(x, 3) for x in row.tolist()] for name, row in zip(("ww", "lw", "wl", "ll"), four)}
        for role in GAP_MODELS:
            if role in lm.roles:
                gaps = pair_gaps(lm, role, pairs, cfg.micro_batch).numpy()
                right = ((gaps[0] > 0) * 1.0 + (gaps[1] < 0)) / 2  # is the sign right, in both directions?
                eq2.append({"model": role, "pairs": kind, "n": len(pairs), "accuracy": float(right.mean()),
                            "ci95": interval(right), "calibration_error": calibration(gaps)})  # fmt: skip
    return {"fig2": fig2, "eq2": eq2}


def judge_curricula(lm, run, pairs, lasts, judges):
    """Table 2: every curriculum's last adapter (lasts: curriculum -> role) improves the same originals -> results.json."""
    pairs = pairs[: run.config.eval_n]
    prompts, (name, judge) = [pair.prompt for pair in pairs], next(iter(judges.items()))
    answers = infer.Answers(lm, run, prompts)
    original = answers.write("original", "policy_rl", prompts)
    before = judge.score(prompts, original.texts)
    after = {c: judge.score(prompts, answers.improve(role, role, original).texts) for c, role in lasts.items()}
    print("\r" + " " * 50 + "\r", end="")
    both = after["annotated,policy"]
    rows = [
        {"curriculum": c, "judge": name, "over_original": compare(x, before, judge.margin),
         "both_over_it": compare(both, x, judge.margin)}
        for c, x in after.items()
    ]  # fmt: skip
    run.add_results(table2=rows, lasts=lasts)
    print(table2(rows))


# ---- the report: made of results.json and metrics.jsonl alone --------------------------------------------------------------


def markdown(header, rows):
    """A table as text that is also Markdown, its columns lined up; numbers to the right."""
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = [all(c[:1] in "+-0123456789" or c == "n/a" for c in column[1:]) for column in zip(*cells)]
    lines = ["| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ("-:"[r]) for w, r in zip(widths, right)) + "|")
    return "\n".join(lines)


def points(row):
    """A comparison's Delta with its interval, in points."""
    low, high = row["ci95"]
    return f"{100 * row['delta']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def table(rows):
    """Table 1; shares in percent, lengths and costs in tokens an answer."""
    header = ["judge", "a", "b", "n", "win", "lose", "tie", "delta", "95% interval", "len a", "len b", "spent on a", "gen."]
    lines = []
    for r in rows:
        if "not_applicable" in r:
            lines.append([r["judge"], r["a"], r["b"]] + ["-"] * 4 + ["n/a"] + ["-"] * 5)
            continue
        low, high = (100 * end for end in r["ci95"])
        lines.append([r["judge"], r["a"], r["b"], r["n"], *(f"{100 * r[x]:.0f}" for x in ("win", "lose", "tie")),
                      f"{100 * r['delta']:+.1f}", f"{low:+.1f} to {high:+.1f}",
                      *(f"{r[x]:.1f}" for x in ("tokens_a", "tokens_b", "generated_tokens")), r["generations"]])  # fmt: skip
    return markdown(header, lines)


def table2(rows):
    header = ["curriculum", "delta over the original", "annotated,policy over it"]
    return markdown(header, [[r["curriculum"], points(r["over_original"]), points(r["both_over_it"])] for r in rows])


def scorecard(results, metrics):
    """The paper's claims, and what its readers asked, as [claim, the paper's number, ours, verdict], by the main judge.

    The rule: holds where the whole interval is above 0, does not hold where none of it is, else cannot tell.
    """
    main, lines = results["main"], []
    table1 = {(r["a"], r["b"]): r for r in results["table1"] + results["not_applicable"] if r["judge"] == main}
    table2 = {r["curriculum"]: r for r in results.get("table2", [])}

    def claim(text, paper, rows, missing="run `ablate`"):
        rows = [r for r in rows if r] or [{"not_applicable": missing}]
        if "not_applicable" in rows[0]:
            lines.append([text, paper, f"n/a: {rows[0]['not_applicable']}", "cannot tell"])
        else:  # a claim of several comparisons shows the worst of them
            low, high = (min(r["ci95"][end] for r in rows) for end in (0, 1))
            verdict = "holds" if low > 0 else "does not hold" if high <= 0 else "cannot tell"
            lines.append([text, paper, points(min(rows, key=lambda r: r["delta"])), verdict])

    claim("PIT beats the original answer", "+7.2 to +33.6", [table1["pit", "original"]])
    claim("PIT beats Self-Refine", "-3.9 to +23.5", [table1["pit", "self_refine"]])
    claim("PIT at temperature 0.4 beats PIT at 1", "best at 0.4 to 0.6", [results["cooler"]])
    claim("Both rounds beat round 0 alone, same budget", "13.0 vs 0.0", [table2.get("annotated", {}).get("both_over_it")])
    claim("Both rounds beat round 1 alone, same budget", "13.0 vs 1.7", [table2.get("policy", {}).get("both_over_it")])
    pit = [r for r in results["table3"] if r["method"] == "pit"]
    claim("PIT beats the original at each of 5 rounds (the worst)", "yes", [r["over_original"] for r in pit])
    refusal = table1["pit", "self_refine"].get("not_applicable")
    claim("... and Self-Refine (the worst round)", "yes", [r.get("over_self_refine") for r in pit], refusal)
    four = {name: np.array(row) for name, row in results["fig2"]["annotated"].items()}
    ordered = np.minimum(four["wl"] - np.maximum(four["ww"], four["ll"]), np.minimum(four["ww"], four["ll"]) - four["lw"]) > 0
    for kind, text, paper in (("annotated", "R_PIT tells better from worse, annotated pairs", "yes (Fig. 2)"),
                              ("written by models", "... and pairs written by the models", "not shown")):  # fmt: skip
        row = next((r for r in results["eq2"] if r["model"] == "reward_gap" and r["pairs"] == kind), None)
        if row:  # a coin is right on half of them
            above = {"delta": 2 * row["accuracy"] - 1, "ci95": [2 * end - 1 for end in row["ci95"]]}
            claim(text, paper, [above])
            ends = " to ".join(f"{100 * end:.0f}" for end in row["ci95"])
            lines[-1][2] = f"{100 * row['accuracy']:.0f}% right [{ends}]"
            if kind == "annotated":
                lines[-1][2] += f"; Eq. 1 in full on {100 * ordered.mean():.0f}%"
    final = {c: interval(end_of(gap_curve(metrics, c))) for c in table2}
    if final:  # "better" by the lower end of each interval, or only by the upper one
        surely, maybe = ([c for c, ends in final.items() if ends[k] > NEAR] for k in (0, 1))
        both = ["annotated,policy"]
        verdict = "holds" if surely == maybe == both else "cannot tell" if both[0] in maybe and surely in ([], both) else ""
        ours = f"surely there: {'; '.join(surely) or 'none'}"
        lines.append(["Only annotated,policy ends with a gap in 'better'", "yes (Fig. 4)", ours, verdict or "does not hold"])
    claim("PIT beats PIT after SFT only", "not shown", [table1["pit", "pit_sft"]])
    claim("PIT beats best-of-2, the same generations", "not shown", [table1["pit", "best_of_2"]])
    claim("PIT beats a second sample of the policy", "not shown", [table1["pit", "second_sample"]])
    return lines


def gap_curve(metrics, curriculum):
    """The mean gap of every PPO iteration of a curriculum of `ablate`, its rounds one after the other."""
    stage = f"ablate_{curriculum.replace(',', '-')}_"
    return [line["score"] for line in metrics if line["stage"].startswith(stage) and line["stage"][len(stage) :].isdigit()]


def end_of(curve):
    """The last fifth of a curve."""
    return curve[-max(1, len(curve) // 5) :]


def write_report(run):
    """All results so far as a page for people -> report.md, its figures beside it. The scorecard comes first."""
    results, metrics = run.results(), run.metrics()
    card = scorecard(results, metrics)
    run.add_results(scorecard=[dict(zip(("claim", "paper", "ours", "verdict"), line)) for line in card])
    for plot in (plot_curves, plot_result, plot_fig2, plot_fig3, plot_rounds, plot_stops, plot_fig4):
        plot(run, results, metrics)
    accuracy = [[j, f"{100 * r['accuracy']:.0f}%", r["margin"]] for j, r in results["judges"].items()]
    refusals = {f"- {r['a']} vs {r['b']}: n/a, {r['not_applicable']}." for r in results["not_applicable"]}
    eq2 = [
        [GAP_MODELS[r["model"]], r["pairs"], r["n"], f"{100 * r['accuracy']:.0f}%",
         " to ".join(f"{100 * end:.0f}" for end in r["ci95"]), f"{r['calibration_error']:.3f}"] for r in results["eq2"]
    ]  # fmt: skip
    table3 = [
        [r["method"], r["round"], f"{r['elo']:.0f}", " to ".join(f"{end:.0f}" for end in r["elo_ci95"]), f"{r['mean']:.3f}",
         " to ".join(f"{end:.3f}" for end in r["mean_ci95"])] for r in results["table3"]
    ]  # fmt: skip
    best = max(results["stops"], key=lambda r: (r["mean"], -r["tokens"]))
    parts = [
        f"# {run.path.name}", "## Scorecard",
        f"By the judge `{results['main']}`; Delta = win - lose, in points, with its 95% interval (paired bootstrap).",
        markdown(["claim", "the paper", "this run", "verdict"], card), "![result](result.png)",
        "## Table 1: who beats whom",
        "Lengths in tokens; `spent on a`: all tokens generated for one final answer of a, in so many generations (`gen.`).",
        table(results["table1"] + results["not_applicable"]), "\n".join(sorted(refusals)),
        "Accuracy on held-out annotated pairs; scores closer than the margin are a tie, and half right:",
        markdown(["judge", "accuracy", "tie margin"], accuracy),
        *(f"Mean score by {j}: " + ", ".join(f"{s} {m:.3f}" for s, m in means.items() if not {"@", "#"} & set(s))
          for j, means in results["mean_score"].items()),
        "## Figure 2: does R_PIT rank?", "![fig2](fig2.png)",
        "Is the sign of the gap right, and is sigma(gap) a probability? (expected calibration error; 0 is perfect)",
        markdown(["gap by", "pairs", "n", "accuracy", "95% interval", "calibration error"], eq2),
        "## Figure 3: temperature", "![fig3](fig3.png)", "## Table 3: five rounds of improvement", "![rounds](rounds.png)",
        markdown(["method", "round", "Elo", "95% interval", "mean score", "95% interval"], table3),
        "## When to stop", "![stops](stops.png)", f"Best here: `--stop {best['stop']} --rounds {best['limit']}`.",
    ]  # fmt: skip
    if "table2" in results:
        parts += ["## Table 2 and Figure 4: curricula", table2(results["table2"]), "![fig4](fig4.png)"]
    parts += ["## Training"] + [
        f"{role} on held-out pairs: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
        for role, measured in results["reward"].items()
    ]
    seconds = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in results["time_s"].items())
    parts += [f"Seconds: {seconds}", "![learning curves](curves.png)\n"]
    write_text(run.path / "report.md", "\n\n".join(part for part in parts if part))


PANELS = [("loss", "SFT: loss (nats a token)", ("policy_sft", "pit_sft")),
          ("accuracy", "Reward models: training accuracy", ("reward_policy", "reward_gap", "judge")),
          ("score", "Policy RL: mean reward R_P", ("policy_rl",)),
          ("score", "PIT RL: mean gap R_PIT (0 = no change)", ("pit_rl",)),
          ("kl", "RL: KL to SFT (nats an answer)", ("policy_rl", "pit_rl")),
          ("length", "RL: answer length (tokens)", ("policy_rl", "pit_rl")),
          ("eos", "RL: share of answers that end", ("policy_rl", "pit_rl")),
          ("explained", "RL: variance explained by critic", ("policy_rl", "pit_rl"))]  # fmt: skip


def save(figure, run, name):
    figure.savefig(run.path / name)
    plt.close(figure)


def bars(ax, x, means, ends, **kwargs):
    """Points with their intervals; ends: (low, high) of each."""
    means, ends = np.array(means), np.array(ends).reshape(-1, 2)
    ax.errorbar(x, means, yerr=np.abs(ends - means[:, None]).T, fmt="o-", **kwargs)


def plot_curves(run, results, metrics):
    """All stages' learning curves, one panel a quantity -> curves.png."""
    figure, axes = plt.subplots(2, 4, figsize=(18, 7))
    for ax, (name, title, prefixes) in zip(axes.flat, PANELS):
        for stage in dict.fromkeys(line["stage"] for line in metrics if line["stage"].startswith(prefixes)):
            ax.plot(
                *zip(*[(line["step"], line[name]) for line in metrics if line["stage"] == stage and name in line]), label=stage
            )
        ax.set(title=title, xlabel="step")
        if ax.lines:
            ax.legend()
    save(figure, run, "curves.png")


LABELS = {
    "pit_sft": "PIT after SFT only", "pit_rl0": "PIT after round 0", "pit": "PIT", "best_of_2": "best of 2 answers by R_P",
    "best_of_3": "best of 3 answers by R_P", "self_refine": "Self-Refine", "self_refine_sft": "Self-Refine by the SFT policy",
    "original": "original", "rounds": "the rounds are over", "same": "the text is unchanged", "gap": "gap not above 0: go back",
    "time": "the time of 1 to 5 rounds is over",
}  # fmt: skip


def plot_result(run, results, metrics):
    """The result in one picture: who beats the policy's own answers, and the gap reward over PIT's rounds -> result.png."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4))
    rows = [r for r in results["table1"] if r["b"] == "original" and r["judge"] == results["main"]][::-1]
    delta = 100 * np.array([row["delta"] for row in rows])
    low, high = 100 * np.array([row["ci95"] for row in rows]).T
    left.errorbar(delta, range(len(rows)), xerr=np.maximum(0, [delta - low, high - delta]), fmt="o")
    left.set_yticks(range(len(rows)), [LABELS[row["a"]] for row in rows])
    left.set_title(f"Better than the policy's own answer? (judge: {results['main']})")
    left.set(xlabel="win - lose, points of held-out prompts (95% interval)", ylim=(-0.5, len(rows) - 0.5))
    left.axvline(0, color="black", linewidth=1)
    lines = [line for line in metrics if line["stage"].startswith("pit_rl")]
    for number, source in enumerate(run.config.rounds.split(",")):
        curve = [(at, line["score"]) for at, line in enumerate(lines) if line["stage"] == f"pit_rl{number}"]
        right.plot(*zip(*curve), label=f"round {number}: improves {source} answers")
    right.axhline(0, color="black", linewidth=1)
    right.set(
        title="How much better than what it was given?", xlabel="PPO iteration", ylabel="mean gap by R_PIT (0 = no change)"
    )
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    save(figure, run, "result.png")


def plot_fig2(run, results, metrics):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), sharex=True)
    names = {"wl": "better after worse, r(w, l)", "ww": "better, unchanged, r(w, w)", "ll": "worse, unchanged, r(l, l)",
             "lw": "worse after better, r(l, w)"}  # fmt: skip
    everything = np.concatenate([x for four in results["fig2"].values() for x in four.values()])
    bins = np.linspace(*np.quantile(everything, [0.002, 0.998]), 40)
    for ax, (kind, four) in zip(axes, results["fig2"].items()):
        for (name, label), color in zip(names.items(), (GREEN, BLUE, ORANGE, RED)):
            ax.hist(np.clip(four[name], bins[0], bins[-1]), bins, density=True, alpha=0.25, color=color)
            ax.hist(np.clip(four[name], bins[0], bins[-1]), bins, density=True, histtype="step", color=color, linewidth=1.5,
                    label=f"{label}: mean {np.mean(four[name]):+.2f}")  # fmt: skip
        ax.set(title=f"Pairs {kind.replace('annotated', 'with annotated answers')} (n = {len(four['wl'])})",
               xlabel="score by R_PIT (log-odds)", ylabel="density")  # fmt: skip
        ax.legend(fontsize=9)
    figure.suptitle("R_PIT's scores r(answer, reference): green should lie right of blue and orange, red left of them")
    save(figure, run, "fig2.png")


def plot_fig3(run, results, metrics):
    figure, ax = plt.subplots(figsize=(7, 4))
    for method in dict.fromkeys(r["method"] for r in results["fig3"]):
        rows = [r for r in results["fig3"] if r["method"] == method]
        ends = 100 * np.array([r["ci95"] for r in rows])
        bars(ax, [r["temperature"] for r in rows], [100 * r["delta"] for r in rows], ends, label=LABELS[method].split(" (")[0])
    ax.axhline(0, color="black", linewidth=1)
    ax.set(title=f"One improvement against the original answer (judge: {results['main']})", xlabel="sampling temperature",
           ylabel="win - lose, points (95% interval)")  # fmt: skip
    ax.legend()
    save(figure, run, "fig3.png")


def plot_rounds(run, results, metrics):
    figure, axes = plt.subplots(1, 2, figsize=(12, 4))
    start = results["table3"][0]
    for method in dict.fromkeys(r["method"] for r in results["table3"][1:]):
        rows = [start] + [r for r in results["table3"] if r["method"] == method]
        for ax, value, ends in zip(axes, ("elo", "mean"), ("elo_ci95", "mean_ci95")):
            bars(ax, [r["round"] for r in rows], [r[value] for r in rows], [r[ends] for r in rows], label=LABELS[method])
    axes[0].set(title="Elo (Bradley-Terry fit)", ylabel="Elo, original = 1000 (95% interval)")
    axes[1].set(title="Mean score", ylabel=f"mean score by {results['main']} (95% interval)")
    for ax in axes:
        ax.set(xlabel="rounds of improvement (0 = the original)", xticks=range(infer.ROUNDS + 1))
        ax.legend()
    save(figure, run, "rounds.png")


def plot_stops(run, results, metrics):
    figure, ax = plt.subplots(figsize=(10, 4.5))
    start, origin = results["table3"][0], results["mean_tokens"]["original"]
    bars(ax, [origin], [start["mean"]], [start["mean_ci95"]], color="black", label="(original, no rounds)")
    for number, stop in enumerate(infer.STOPS):  # thick, then ever thinner: rules that agree stay visible
        rows = [r for r in results["stops"] if r["stop"] == stop]
        tokens, means, ends = ([r[name] for r in rows] for name in ("tokens", "mean", "ci95"))
        bars(ax, tokens, means, ends, label=LABELS[stop], linewidth=4 - number, markersize=10 - 2 * number)
    ax.set(title=f"When to stop improving: each line is a rule, its points allow 1 to {infer.ROUNDS} rounds",
           xlabel="tokens generated for an answer, the original's included",
           ylabel=f"mean score by {results['main']} (95% interval)")  # fmt: skip
    ax.legend(title="stop when", loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, run, "stops.png")


def plot_fig4(run, results, metrics):
    """The gap reward over PPO iterations, one line a curriculum, smoothed over 5 iterations -> fig4.png."""
    if "table2" not in results:
        return
    figure, ax = plt.subplots(figsize=(9, 5))
    for row in results["table2"]:
        curve = gap_curve(metrics, row["curriculum"])
        smooth = [np.mean(curve[max(0, at - 4) : at + 1]) for at in range(len(curve))]
        (line,) = ax.plot(range(1, len(curve) + 1), smooth, label=row["curriculum"].replace(",", ", then "), linewidth=2)
        ax.plot(range(1, len(curve) + 1), curve, color=line.get_color(), alpha=0.2)
    low, high = ax.get_ylim()
    low, high = min(low, -3 * NEAR), max(high, 3 * NEAR)
    for bottom, top, color, name in (
        (NEAR, high, GREEN, "better"),
        (-NEAR, NEAR, "gray", "no change"),
        (low, -NEAR, RED, "worse"),
    ):
        ax.axhspan(bottom, top, color=color, alpha=0.08)
        ax.text(1.01, (bottom + top) / 2, name, transform=ax.get_yaxis_transform(), va="center")
    ax.set(title="What each curriculum learns (smoothed over 5 iterations)", xlabel="PPO iteration, all rounds counted",
           ylabel="mean gap by R_PIT over y_ref (0 = no change)", ylim=(low, high))  # fmt: skip
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(title="y_ref comes from")
    save(figure, run, "fig4.png")


def show_samples(lm, run, stage, pairs):
    """Answer the same prompts after each stage, and improve the answers once there is a PIT model -> samples.md, console."""
    cfg, policy = run.config, "policy_rl" if "policy_rl" in lm.roles else "policy_sft"
    prompts = [pair.prompt for pair in pairs]
    seed_all(cfg.seed, "samples")
    answers = infer.answer(lm, policy, prompts, cfg)
    improved = infer.improve(lm, stage, prompts, answers, cfg) if stage.startswith("pit") else None
    page = f"\n## after {stage}\n"
    for i, prompt in enumerate(prompts):
        rows = {"prompt": prompt[-1]["content"], policy: answers[i]} | ({stage: improved[i]} if improved else {})
        page += "\n" + "".join(f"- {who}: {text}\n" for who, text in rows.items())
        if i < 2:
            print("".join(f"  {who:10} {shorten(text, 87)}\n" for who, text in rows.items()), end="")
    write_text(run.path / "samples.md", run.samples() + page)
