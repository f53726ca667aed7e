"""The evidence of a run, drawn: Table 1 on the console; report.md with the scorecard, all tables and figures.

Measuring needs the model and is done in evaluate.py; what is here needs the run's files alone.
Everywhere Delta = win - lose, in points of held-out prompts, with its 95% interval.
"""

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluate import GAP_MODELS, interval
from judges import NEAR
from run import write_text

BLUE, ORANGE, GREEN, RED, PINK = COLORS = (
    "#0072B2 #E69F00 #009E73 #D55E00 #CC79A7".split()
)  # Okabe and Ito, for every eye
plt.rcParams.update(
    {
        "axes.prop_cycle": plt.cycler(color=COLORS),
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.figsize": (12, 4.2),
        "figure.constrained_layout.use": True,
        "savefig.dpi": 100,
        "errorbar.capsize": 3,
        "legend.fontsize": 9,
    }
)
LABELS = {
    "pit_sft": "PIT after SFT only",
    "pit_rl0": "PIT after round 0",
    "pit": "PIT",
    "best_of_2": "best of 2 answers by R_P",
    "best_of_3": "best of 3 answers by R_P",
    "self_refine": "Self-Refine",
    "self_refine_sft": "Self-Refine by the SFT policy",
    "rounds": "the rounds are over",
    "same": "the text is unchanged",
    "gap": "gap not above 0: go back",
    "time": "the time is over",
}


# ---- tables ----------------------------------------------------------------------------------------------------------------


def markdown(header, rows):
    """A table as text that is also Markdown, its columns lined up; numbers to the right."""
    cells = [list(map(str, row)) for row in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = [
        all(c[:1] in "+-0123456789" or c == "n/a" for c in column[1:]) for column in zip(*cells)
    ]
    lines = [
        "| "
        + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right))
        + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ("-:"[r]) for w, r in zip(widths, right)) + "|")
    return "\n".join(lines)


def points(row):
    """A comparison's Delta with its interval, in points."""
    low, high = row["ci95"]
    return f"{100 * row['delta']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def span(ends, form=".0f"):
    """An interval in words."""
    return " to ".join(f"{end:{form}}" for end in ends)


def table(rows, columns=slice(None)):
    """Table 1, or some of its columns; shares in percent, lengths and costs in tokens an answer."""
    header = [
        "judge",
        "a",
        "b",
        "n",
        "win",
        "lose",
        "tie",
        "delta",
        "95% interval",
        "len a",
        "len b",
        "spent on a",
        "gen.",
    ]
    lines = []
    for r in rows:
        if "not_applicable" in r:
            numbers = ["-"] * 4 + ["n/a"] + ["-"] * 5
        else:
            numbers = [
                r["n"],
                *(f"{100 * r[x]:.0f}" for x in ("win", "lose", "tie")),
                f"{100 * r['delta']:+.1f}",
                span([100 * end for end in r["ci95"]], "+.1f"),
                *(f"{r[x]:.1f}" for x in ("tokens_a", "tokens_b", "generated_tokens")),
                r["generations"],
            ]
        lines.append([r["judge"], r["a"], r["b"], *numbers])
    return markdown(header[columns], [line[columns] for line in lines])


def table2(rows):
    header = ["curriculum", "delta over the original", "annotated,policy over it"]
    return markdown(
        header,
        [[r["curriculum"], points(r["over_original"]), points(r["both_over_it"])] for r in rows],
    )


def scorecard(results, metrics):
    """The paper's claims, and what its readers asked, as [claim, the paper's number, ours, verdict], by the main judge.

    The rule: holds where the whole interval is above 0, does not hold where none of it is, else cannot tell.
    """
    main, lines = results["main"], []
    table1 = {
        (r["a"], r["b"]): r
        for r in results["table1"] + results["not_applicable"]
        if r["judge"] == main
    }
    table2 = {r["curriculum"]: r for r in results.get("table2", [])}

    def claim(text, paper, rows, missing="run `ablate`"):
        rows = [r for r in rows if r] or [{"not_applicable": missing}]
        if "not_applicable" in rows[0]:
            lines.append([text, paper, f"n/a: {rows[0]['not_applicable']}", "cannot tell"])
        else:  # a claim of several comparisons stands or falls with the worst of them
            worst = min(rows, key=lambda r: (r["ci95"][1] > 0, r["ci95"][0]))
            low, high = worst["ci95"]
            verdict = "holds" if low > 0 else "does not hold" if high <= 0 else "cannot tell"
            lines.append([text, paper, points(worst), verdict])

    claim("PIT beats the original answer", "+7.2 to +33.6", [table1["pit", "original"]])
    claim("PIT beats Self-Refine", "-3.9 to +23.5", [table1["pit", "self_refine"]])
    claim("PIT at temperature 0.4 beats PIT at 1", "best at 0.4 to 0.6", [results["cooler"]])
    claim(
        "Both rounds beat round 0 alone, same budget",
        "13.0 vs 0.0",
        [table2.get("annotated", {}).get("both_over_it")],
    )
    claim(
        "Both rounds beat round 1 alone, same budget",
        "13.0 vs 1.7",
        [table2.get("policy", {}).get("both_over_it")],
    )
    pit = [r for r in results["table3"] if r["method"] == "pit"]
    claim(
        "PIT beats the original at each of 5 rounds (the worst)",
        "yes",
        [r["over_original"] for r in pit],
    )
    refusal = table1["pit", "self_refine"].get("not_applicable")
    claim(
        "... and Self-Refine (the worst round)",
        "yes",
        [r.get("over_self_refine") for r in pit],
        refusal,
    )
    wl, ww, ll, lw = (
        np.array(results["fig2"]["annotated"][name]) for name in ("wl", "ww", "ll", "lw")
    )
    ordered = (wl > ww) & (wl > ll) & (ww > lw) & (ll > lw)
    for kind, text, paper in (
        ("annotated", "R_PIT tells better from worse, annotated pairs", "yes (Fig. 2)"),
        ("written by models", "... and pairs written by the models", "not shown"),
    ):
        row = next(
            (r for r in results["eq2"] if r["model"] == "reward_gap" and r["pairs"] == kind), None
        )
        if row:  # a coin is right on half of them
            claim(
                text,
                paper,
                [{"delta": 2 * row["accuracy"] - 1, "ci95": [2 * end - 1 for end in row["ci95"]]}],
            )
            lines[-1][2] = (
                f"{100 * row['accuracy']:.0f}% right [{span([100 * end for end in row['ci95']])}]"
            )
            if kind == "annotated":
                lines[-1][2] += f"; Eq. 1 in full on {100 * ordered.mean():.0f}%"
    curves = {c: gap_curve(metrics, c) for c in table2}
    final = {
        c: interval(curve[-max(1, len(curve) // 5) :]) for c, curve in curves.items()
    }  # of its last fifth
    if final:  # "better" by the lower end of each interval, or only by the upper one
        surely, maybe = ([c for c, ends in final.items() if ends[k] > NEAR] for k in (0, 1))
        both = ["annotated,policy"]
        verdict = (
            "holds"
            if surely == maybe == both
            else "cannot tell"
            if {*surely} <= {*both} <= {*maybe}
            else "does not hold"
        )
        ours = (
            f"all {len(final)} curricula do"
            if len(surely) == len(final)
            else f"surely there: {'; '.join(surely) or 'none'}"
        )
        lines.append(
            ["Only annotated,policy ends with a gap in 'better'", "yes (Fig. 4)", ours, verdict]
        )
    claim("PIT beats PIT after SFT only", "not shown", [table1["pit", "pit_sft"]])
    claim("PIT beats best-of-2, the same generations", "not shown", [table1["pit", "best_of_2"]])
    claim("PIT beats a second sample of the policy", "not shown", [table1["pit", "second_sample"]])
    return lines


def gap_curve(metrics, curriculum):
    """The mean gap of every PPO iteration of a curriculum of `ablate`, its rounds one after the other."""
    stage = f"ablate_{curriculum.replace(',', '-')}_"
    return [
        line["score"]
        for line in metrics
        if line["stage"].startswith(stage) and line["stage"][len(stage) :].isdigit()
    ]


def print_table1(run):
    """Table 1 on the console: by the main judge, and no wider than 100 columns."""
    results = run.results()
    rows = [
        r for r in results["table1"] + results["not_applicable"] if r["judge"] == results["main"]
    ]
    print(
        f"\nTable 1, by the judge {results['main']}: does a beat b? In points of held-out prompts, delta = win - lose.\n"
    )
    print(table(rows, slice(1, 9)))
    for reason in {r["not_applicable"] for r in results["not_applicable"]}:
        print(f"n/a: {reason}")
    print(
        f"\nAll tables and figures: {run.path / 'report.md'}\nAnswers after each stage: {run.path / 'samples.md'}"
    )


def write_report(run):
    """All results so far as a page for people -> report.md, its figures beside it; Table 1 goes to the console too."""
    results, metrics = run.results(), run.metrics()
    card = scorecard(results, metrics)
    run.add_results(
        scorecard=[dict(zip(("claim", "paper", "ours", "verdict"), line)) for line in card]
    )
    for plot in (
        plot_curves,
        plot_result,
        plot_fig2,
        plot_fig3,
        plot_rounds,
        plot_stops,
        plot_fig4,
    ):
        plot(run, results, metrics)
    refusals = {
        f"- {r['a']} vs {r['b']}: n/a, {r['not_applicable']}." for r in results["not_applicable"]
    }
    eq2 = [
        [
            GAP_MODELS[r["model"]],
            r["pairs"],
            r["n"],
            f"{100 * r['accuracy']:.0f}%",
            span([100 * end for end in r["ci95"]]),
            f"{r['calibration_error']:.3f}",
        ]
        for r in results["eq2"]
    ]
    table3 = [
        [
            r["method"],
            r["round"],
            f"{r['elo']:.0f}",
            span(r["elo_ci95"]),
            f"{r['mean']:.3f}",
            span(r["mean_ci95"], ".3f"),
        ]
        for r in results["table3"]
    ]
    best = max(results["stops"], key=lambda r: (r["mean"], -r["tokens"]))
    parts = [
        f"# {run.path.name}",
        "## Scorecard",
        f"By the judge `{results['main']}`; Delta = win - lose, in points, with its 95% interval (paired bootstrap).",
        markdown(["claim", "the paper", "this run", "verdict"], card),
        "![result](result.png)",
        "## Table 1: who beats whom",
        "Lengths in tokens; `spent on a`: all tokens generated for one final answer of a, in so many generations (`gen.`).",
        table(results["table1"] + results["not_applicable"]),
        "\n".join(sorted(refusals)),
        "Accuracy on held-out annotated pairs; scores closer than the margin are a tie, and half right:",
        markdown(
            ["judge", "accuracy", "tie margin"],
            [[j, f"{100 * r['accuracy']:.0f}%", r["margin"]] for j, r in results["judges"].items()],
        ),
        *(
            f"Mean score by {j}: "
            + ", ".join(f"{s} {m:.3f}" for s, m in means.items() if not {"@", "#"} & set(s))
            for j, means in results["mean_score"].items()
        ),
        "## Figure 2: does R_PIT rank?",
        "![fig2](fig2.png)",
        "Is the sign of the gap right, and is sigma(gap) a probability? (expected calibration error; 0 is perfect)",
        markdown(["gap by", "pairs", "n", "accuracy", "95% interval", "calibration error"], eq2),
        "## Figure 3: temperature",
        "![fig3](fig3.png)",
        "## Table 3: five rounds of improvement",
        "![rounds](rounds.png)",
        markdown(["method", "round", "Elo", "95% interval", "mean score", "95% interval"], table3),
        "## When to stop",
        "![stops](stops.png)",
        f"Best: `--stop {best['stop']}`, {best['limit']} rounds (`time`: as long as they take).",
    ]
    if "table2" in results:
        parts += [
            "## Table 2 and Figure 4: curricula",
            table2(results["table2"]),
            "![fig4](fig4.png)",
        ]
    rl = [
        [
            f"{r['before']} -> {r['after']}",
            r["by"],
            f"{r['start']:.2f}",
            f"{r['end']:.2f}",
            span(r["ci95"], "+.2f"),
        ]
        for r in results["rl"]
    ]
    parts += [
        "## Training",
        "What RL did to its own reward, on the held-out prompts; gaps are over the original answers:",
        markdown(["stage", "mean", "before", "after", "95% interval of the rise"], rl),
    ]
    parts += [
        f"{role} on held-out pairs: "
        + ", ".join(f"{name} {value:.3f}" for name, value in measured.items())
        for role, measured in results.get("reward", {}).items()
    ]
    seconds = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in results["time_s"].items())
    parts += [f"Seconds: {seconds}.", "![learning curves](curves.png)\n"]
    write_text(run.path / "report.md", "\n\n".join(part for part in parts if part))
    print_table1(run)


# ---- figures ---------------------------------------------------------------------------------------------------------------


POLICIES = ("policy_rl", "pit_rl")
PANELS = [
    ("loss", "SFT: loss (nats a token)", ("policy_sft", "pit_sft")),
    (
        "accuracy",
        "Reward models: right on training pairs",
        ("reward_policy", "reward_gap", "judge"),
    ),
    ("score", "Policy RL: mean reward by R_P", ("policy_rl",)),
    ("score", "PIT RL: mean gap by R_PIT (0 = no change)", ("pit_rl",)),
    ("kl", "RL: KL to the SFT model (nats an answer)", POLICIES),
    ("length", "RL: length of answers (tokens)", POLICIES),
    ("eos", "RL: share of answers that end by themselves", POLICIES),
    ("explained_variance", "RL: variance explained by the critic (1 = all)", POLICIES),
]


def save(figure, run, name):
    figure.savefig(run.path / name)
    plt.close(figure)


def whole_numbers(ax):  # steps, iterations and rounds are counted: no 0.5 on their axis
    ax.xaxis.get_major_locator().set_params(integer=True)


def bars(ax, x, means, ends, **kwargs):
    """Points with their intervals; ends: (low, high) of each."""
    means, ends = np.array(means), np.array(ends).reshape(-1, 2)
    ax.errorbar(x, means, yerr=np.abs(ends - means[:, None]).T, fmt="o-", **kwargs)


def plot_curves(run, results, metrics):
    """All stages' learning curves, one panel a quantity -> curves.png."""
    figure, axes = plt.subplots(2, 4, figsize=(18, 7))
    for ax, (name, title, prefixes) in zip(axes.flat, PANELS):
        for k, stage in enumerate(
            dict.fromkeys(line["stage"] for line in metrics if line["stage"].startswith(prefixes))
        ):
            curve = [
                (line["step"] + 1, line[name])
                for line in metrics
                if line["stage"] == stage and name in line
            ]
            # ever thinner: curves that agree stay visible
            ax.plot(
                *zip(*curve),
                marker="." if len(curve) < 10 else None,
                label=stage,
                linewidth=max(1, 3.5 - k),
            )
        ax.set(title=title, xlabel="PPO iteration" if "RL" in title else "optimiser step")
        whole_numbers(ax)
        if ax.lines:
            ax.legend()
    save(figure, run, "curves.png")


def plot_result(run, results, metrics):
    """The result in one picture: who beats the policy's own answers, and the gap reward over PIT's rounds -> result.png."""
    figure, (left, right) = plt.subplots(1, 2)
    rows = [r for r in results["table1"] if r["b"] == "original" and r["judge"] == results["main"]][
        ::-1
    ]
    delta, ends = (100 * np.array([row[name] for row in rows]) for name in ("delta", "ci95"))
    left.errorbar(delta, range(len(rows)), xerr=np.abs(ends.T - delta), fmt="o")
    left.set_yticks(range(len(rows)), [LABELS[row["a"]] for row in rows])
    left.set_title(f"Better than the policy's own answer? (judge: {results['main']})")
    left.set(
        xlabel="win - lose, points of held-out prompts (95% interval)", ylim=(-0.5, len(rows) - 0.5)
    )
    left.axvline(0, color="black", linewidth=1)
    lines = [line for line in metrics if line["stage"].startswith("pit_rl")]
    for number, source in enumerate(run.config.rounds.split(",")):
        curve = [
            (at, line["score"])
            for at, line in enumerate(lines, 1)
            if line["stage"] == f"pit_rl{number}"
        ]
        right.plot(*zip(*curve), marker=".", label=f"round {number}: improves {source} answers")
    right.axhline(0, color="black", linewidth=1)
    right.set(
        title="How much better than what it was given?",
        xlabel="PPO iteration, all rounds counted",
        ylabel="mean gap by R_PIT (0 = no change)",
    )
    whole_numbers(right)
    right.legend()
    save(figure, run, "result.png")


def plot_fig2(run, results, metrics):
    """The four distributions of Eq. 1 on both kinds of pairs -> fig2.png."""
    figure, axes = plt.subplots(1, len(results["fig2"]), sharex=True, squeeze=False)
    names = {
        "wl": "better after worse, r(w, l)",
        "ww": "better, unchanged, r(w, w)",
        "ll": "worse, unchanged, r(l, l)",
        "lw": "worse after better, r(l, w)",
    }
    everything = np.concatenate([x for four in results["fig2"].values() for x in four.values()])
    bins = np.linspace(*np.quantile(everything, [0.002, 0.998]), 40)
    for ax, (kind, four) in zip(axes[0], results["fig2"].items()):
        for (name, label), color in zip(names.items(), (GREEN, BLUE, ORANGE, RED)):
            ax.hist(
                np.clip(four[name], bins[0], bins[-1]),
                bins,
                density=True,
                histtype="stepfilled",
                facecolor=(color, 0.2),
                edgecolor=color,
                linewidth=1.5,
                label=f"{label}: mean {np.mean(four[name]):+.2f}",
            )
        kind = kind.replace("annotated", "with annotated answers")
        ax.set(
            title=f"Pairs {kind} (n = {len(four['wl'])})",
            xlabel="score by R_PIT (log-odds)",
            ylabel="density",
        )
        ax.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            ncol=2,
            fontsize=8,
            columnspacing=1,
            handlelength=1.2,
        )
    figure.suptitle(
        "R_PIT's scores r(answer, reference): green should lie right of blue and orange, red left of them"
    )
    save(figure, run, "fig2.png")


def plot_fig3(run, results, metrics):
    """Delta over the original at each temperature -> fig3.png."""
    figure, ax = plt.subplots(figsize=(8, 4.2))
    for method in dict.fromkeys(r["method"] for r in results["fig3"]):
        rows = [r for r in results["fig3"] if r["method"] == method]
        curve = [(r["temperature"], 100 * r["delta"], 100 * np.array(r["ci95"])) for r in rows]
        bars(ax, *zip(*curve), label=LABELS[method])
    ax.axhline(0, color="black", linewidth=1)
    ax.set(
        title=f"One improvement against the original answer (judge: {results['main']})",
        xlabel="sampling temperature",
        ylabel="win - lose, points (95% interval)",
    )
    ax.legend()
    save(figure, run, "fig3.png")


def plot_rounds(run, results, metrics):
    """Table 3: Elo and mean score after each round of improvement -> rounds.png."""
    figure, axes = plt.subplots(1, 2)
    start = results["table3"][0]
    for method in dict.fromkeys(r["method"] for r in results["table3"][1:]):
        rows = [start] + [r for r in results["table3"] if r["method"] == method]
        for ax, value in zip(axes, ("elo", "mean")):
            bars(
                ax,
                *zip(*[(r["round"], r[value], r[f"{value}_ci95"]) for r in rows]),
                label=LABELS[method],
            )
    axes[0].set(
        title="Who beats whom, over the rounds", ylabel="Elo, original = 1000 (95% interval)"
    )
    axes[1].set(
        title="How good the answers are", ylabel=f"mean score by {results['main']} (95% interval)"
    )
    for ax in axes:
        ax.set(xlabel="rounds of improvement (0 = the original)")
        whole_numbers(ax)
        ax.legend()
    save(figure, run, "rounds.png")


def plot_stops(run, results, metrics):
    """What each stop rule gives for its tokens -> stops.png."""
    figure, ax = plt.subplots()
    start, origin = results["table3"][0], results["mean_tokens"]["original"]
    bars(
        ax,
        [origin],
        [start["mean"]],
        [start["mean_ci95"]],
        color="black",
        label="(the original, no rounds)",
    )
    for number, stop in enumerate(dict.fromkeys(r["stop"] for r in results["stops"])):
        rows = [(r["tokens"], r["mean"], r["ci95"]) for r in results["stops"] if r["stop"] == stop]
        # thick, then ever thinner: rules that agree stay visible
        bars(
            ax,
            *zip(*rows),
            label=LABELS.get(stop, stop),
            linewidth=max(1, 4 - number),
            markersize=max(3, 10 - 2 * number),
        )
    ax.set(
        title="When to stop improving: each line is a rule, its points from left to right allow one round more each",
        xlabel="tokens generated for an answer, the original's included",
        ylabel=f"mean score by {results['main']} (95% interval)",
    )
    ax.legend(title="stop when", loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, run, "stops.png")


def plot_fig4(run, results, metrics):
    """The gap reward over PPO iterations, one line a curriculum, smoothed over 5 iterations -> fig4.png."""
    if "table2" not in results:
        return
    figure, ax = plt.subplots()
    for row in results["table2"]:
        curve = gap_curve(metrics, row["curriculum"])
        smooth = [np.mean(curve[max(0, at - 4) : at + 1]) for at in range(len(curve))]
        (line,) = ax.plot(
            range(1, len(curve) + 1),
            smooth,
            label=row["curriculum"].replace(",", ", then "),
            linewidth=2,
        )
        ax.plot(range(1, len(curve) + 1), curve, color=line.get_color(), alpha=0.2)
    low, high = (
        min(ax.get_ylim()[0], -3 * NEAR, -0.15 * ax.get_ylim()[1]),
        max(ax.get_ylim()[1], 3 * NEAR),
    )
    regions = (
        (NEAR, high, GREEN, "better"),
        (-NEAR, NEAR, "gray", "no change"),
        (low, -NEAR, RED, "worse"),
    )
    for number, (bottom, top, color, name) in enumerate(regions):
        ax.axhspan(bottom, top, color=color, alpha=0.08)
        at = 0.06 * (high - low) * (1 - number)  # apart, however thin the middle one is
        ax.text(1.01, at, name, transform=ax.get_yaxis_transform(), va="center")
    ax.set(
        title="What each curriculum learns (smoothed over 5 iterations)",
        xlabel="PPO iteration, all rounds counted",
        ylabel="mean gap by R_PIT over y_ref (0 = no change)",
        ylim=(low, high),
    )
    whole_numbers(ax)
    ax.legend(title="y_ref comes from")
    save(figure, run, "fig4.png")
