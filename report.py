"""The evidence of a run, drawn: Table 1 on the console, and report.md with all tables and figures.

Measuring needs the model and is done in evaluate.py. Drawing needs only the files in the run's
folder, so a report can be drawn again at any time. Its page is the template report.md.jinja.
Everywhere Delta = win - lose, in points of held-out prompts, with its 95% interval.
"""

import json
import os
import platform
import re
from itertools import groupby
from pathlib import Path
from textwrap import fill

import jinja2
import matplotlib
import matplotlib.ticker
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluate import GAP_MODELS, interval
from judges import NEAR
from run import write_text

# by Okabe and Ito: color-blind readers can tell them apart
BLUE, ORANGE, GREEN, PINK, RED, GRAY = "#0072B2 #E69F00 #009E73 #CC79A7 #D55E00 #777777".split()
plt.rcParams.update(
    {
        "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, PINK, RED]),
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.figsize": (12, 4.6),
        "figure.constrained_layout.use": True,
        "savefig.dpi": 100,
        "errorbar.capsize": 3,
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
    "quality": "the exact rule",
    "judge": "the run's own judge",
    "rounds": "after a number of rounds",
    "same": "when the text stays the same",
    "gap": "when the gap is not above 0",
    "time": "when the time is up",
}


def label(name):
    """What figures call a side, a judge or a stop rule."""
    return LABELS.get(name, name)


# ---- the page ----------------------------------------------------------------------------------


def span(ends, form=".0f", scale=1):
    """An interval in words."""
    low, high = ends
    return f"{scale * low:{form}} to {scale * high:{form}}"


def points(row, form="+.1f"):
    """A comparison's Delta with its interval, in points."""
    low, high = row["ci95"]
    return f"{100 * row['delta']:{form}} [{100 * low:{form}}, {100 * high:{form}}]"


def wrapped(name, text):
    """A text of a sample beside its name, in 80 columns."""
    indent = " " * 10
    return fill(f"{name:9} {text}", 80, subsequent_indent=indent, max_lines=6, placeholder=" [...]")


def line_up(page):
    """The same Markdown, with the columns of its tables lined up for those who read it as text."""
    parts = []
    for is_table, lines in groupby(page.split("\n"), key=lambda line: line.startswith("|")):
        if is_table:
            rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
            columns = [line_up_column(*column) for column in zip(*rows)]
            lines = [f"| {' | '.join(row)} |" for row in zip(*columns)]
        parts += lines
    return "\n".join(parts)


def line_up_column(title, rule, *cells):
    """One column of a table: text to the left; numbers, whose rule is `--:`, to the right."""
    width = max(map(len, [title, *cells]))
    side = ">" if rule.endswith(":") else "<"
    rule = "-" * (width - 1) + rule[-1]
    return [f"{cell:{side}{width}}" for cell in (title, rule, *cells)]


def block(name, **values):
    """One block of the page alone."""
    return line_up("".join(PAGE.blocks[name](PAGE.new_context(values))).strip())


def table(rows):
    """Table 1, or some of its rows: who beats whom, in percent and points."""
    return block("table1", rows=rows)


def table2(rows):
    """Table 2: what each curriculum's last adapter is worth."""
    return block("table2", results={"table2": rows})


def judged_by(results, judge):
    """The rows of Table 1 by one judge."""
    return [row for row in results["table1"] if row["judge"] == judge]


def examples(run, judge):
    """Where a judge sees PIT's largest gain over the original, the median, and the largest loss."""
    with open(run.path / "answers.jsonl", encoding="utf-8") as file:
        lines = list(map(json.loads, file))
    lines.sort(key=lambda line: line["scores"][judge]["pit"] - line["scores"][judge]["original"])
    return {"Largest gain": lines[-1], "Median": lines[len(lines) // 2], "Largest loss": lines[0]}


def alarms(results):
    """The words that win more than a third of PIT's delta alone: rows of results["words"]."""
    words = results.get("words")
    if not words or words["delta"]["ci95"][0] <= 0:
        return []
    most = 2 / 3 * words["delta"]["delta"]
    return [row for row in words["rows"] if "without" in row and row["without"]["delta"] < most]


def print_table1(run):
    """Table 1 by the main judge, and the warnings, on the console."""
    results = run.results()
    rows = judged_by(results, results["main"])
    print(
        f"\nTable 1: does a beat b? In percent of {rows[0]['n']} held-out prompts.\n"
        f"Judged by {label(results['main'])}; delta = win - lose.\n\n{table(rows)}"
    )
    for reason in {row["not_applicable"] for row in rows if "n" not in row}:
        print(f"n/a: {reason}")
    for row in alarms(results):
        print(
            f"Warning: without the word {row['feature']!r}, PIT's delta over the original is\n"
            f"only {points(row['without'])}. Does the judge like the answers, or that word?"
        )
    print(
        f"\nAll tables and figures: {run.path / 'report.md'}\n"
        f"Answers after each stage: {run.path / 'samples.md'}"
    )


def write_report(run):
    """All results so far as a page for people: report.md, and its figures; Table 1 is printed."""
    results, metrics = run.results(), run.metrics()
    results["scorecard"] = scorecard(results, metrics)
    run.add_results(scorecard=results["scorecard"])
    for plot in (plot_curves, plot_result, plot_fig2, plot_fig3, plot_rounds, plot_stops):
        plot(run, results, metrics)
    if "table2" in results:
        plot_fig4(run, results, metrics)
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    page = PAGE.render(run=run, cfg=run.config, results=results, machine=machine)
    write_text(run.path / "report.md", line_up(page))
    print_table1(run)


# ---- scorecard ---------------------------------------------------------------------------------


CLAIMS = [  # that are one comparison of Table 1: the claim, the paper's number, a, b
    ("PIT beats the original", "7 to 34", "pit", "original"),
    ("PIT beats Self-Refine", "-4 to 24", "pit", "self_refine"),
    ("PIT beats y_w", "not said", "pit", "y_w"),
    ("PIT beats PIT after SFT only", "not said", "pit", "pit_sft"),
    ("PIT beats best of 2, same cost", "not said", "pit", "best_of_2"),
    ("PIT beats a second sample", "not said", "pit", "second_sample"),
]
VERDICTS = ["does not hold", "cannot tell", "holds"]  # the worst first
BOTH = "annotated,policy"  # the paper's curriculum


def verdict(ends, zero=0.0):
    """The rule: a claim holds where its 95% interval is above 0, and not where none of it is."""
    low, high = ends
    if low > zero:
        return "holds"
    if high <= zero:
        return "does not hold"
    return "cannot tell"


def claim(text, paper, rows):
    """A line of the scorecard. A claim of several comparisons stands or falls with the worst."""
    rows = [row for row in rows if row and "delta" in row]
    ours, result = "n/a", "cannot tell"
    if rows:
        worst = min(rows, key=lambda row: (VERDICTS.index(verdict(row["ci95"])), row["delta"]))
        ours, result = points(worst, "+.0f"), verdict(worst["ci95"])
    return {"claim": text, "paper": paper, "ours": ours, "verdict": result}


def scorecard(results, metrics):
    """The paper's claims, and what its readers asked, by the main judge -> a list of dicts."""
    card = table1_claims(results, results["main"])
    rounds = grouped(results["table3"], "method")["pit"]
    temperatures = grouped(results["fig3"], "method")["pit"]
    curricula = {row["curriculum"]: row["both_over_it"] for row in results.get("table2", [])}
    cooler = {row["temperature"]: row.get("04_over_it") for row in temperatures}
    card += [
        claim("temperature 0.4 beats 1", "yes", [cooler[1.0]]),
        claim("0.4 is the best temperature", "0.4-0.6", cooler.values()),
        claim("each round beats the original", "yes", [row["over_original"] for row in rounds]),
        claim("... and Self-Refine", "yes", [row.get("over_self_refine") for row in rounds]),
        claim("round 2 beats round 1", "not said", [rounds[1]["over_previous"]]),
        claim("two rounds beat round 0 alone", "13 vs 0", [curricula.get("annotated")]),
        claim("two rounds beat round 1 alone", "13 vs 2", [curricula.get("policy")]),
    ]
    card += [ranking_claim(row) for row in results["eq2"] if row["model"] == "reward_gap"]
    if curricula:
        card.append(better_claim(metrics, curricula))
    return card


def table1_claims(results, judge):
    """The claims that rows of Table 1 decide, by one judge."""
    rows = {(row["a"], row["b"]): row for row in judged_by(results, judge)}
    return [claim(text, paper, [rows.get((a, b))]) for text, paper, a, b in CLAIMS]


def ranking_claim(row):
    """Does R_PIT tell better from worse? A coin is right on half of the pairs."""
    text, paper = "R_PIT ranks annotated pairs", "yes"
    if row["pairs"] != "annotated":
        text, paper = "... and pairs by models", "not said"
    ours = points(row | {"delta": row["accuracy"]}, ".0f") + " %"
    result = verdict(row["ci95"], zero=0.5)
    return {"claim": text, "paper": paper, "ours": ours, "verdict": result}


def better_claim(metrics, curricula):
    """Does the gap of the paper's curriculum, and of no other, end above "no change"?"""
    ends = {}
    for name in curricula:
        curve = gap_curve(metrics, name)
        last_fifth = curve[-max(1, len(curve) // 5) :]
        ends[name] = verdict(interval(last_fifth), zero=NEAR)
    ours = f"{list(ends.values()).count('holds')} of {len(ends)} do"
    both = ends.pop(BOTH)
    others = ends.values()
    result = "cannot tell"
    if both == "does not hold" or "holds" in others:
        result = "does not hold"
    elif both == "holds" and "cannot tell" not in others:
        result = "holds"
    text = "only two rounds end 'better'"
    return {"claim": text, "paper": "yes", "ours": ours, "verdict": result}


def gap_curve(metrics, curriculum):
    """The mean gap of every PPO iteration of a curriculum of `ablate`, round after round."""
    stages = rf"ablate_{curriculum.replace(',', '-')}_\d+"
    return [line["score"] for line in metrics if re.fullmatch(stages, line["stage"])]


# ---- figures -----------------------------------------------------------------------------------


POLICIES = ("policy_rl", "pit_rl")
PANELS = [  # of curves.png: a metric, what it is, the stages that log it
    ("loss", "SFT: loss (nats per token)", ("policy_sft", "pit_sft")),
    ("accuracy", "Reward models: pairs ranked right", ("reward", "judge")),
    ("score", "Policy RL: mean reward by R_P", ("policy_rl",)),
    ("score", "PIT RL: mean gap by R_PIT (0 = no change)", ("pit_rl",)),
    ("kl", "RL: KL to SFT (nats per answer, 0 = same)", POLICIES),
    ("length", "RL: length of answers (tokens)", POLICIES),
    ("eos", "RL: share of answers with an end", POLICIES),
    ("explained_variance", "RL: variance explained by the critic (0 = none)", POLICIES),
]


IN_POINTS = matplotlib.ticker.PercentFormatter(1, symbol="")


def save(figure, run, name, columns=3):
    """Write a figure. Its legends stand below the axes, where they cover nothing."""
    for ax in figure.axes:
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=columns, frameon=False)
    figure.savefig(run.path / name)
    plt.close(figure)


def whole_numbers(ax):  # steps, iterations and rounds are counted: no 0.5 on their axis
    ax.xaxis.get_major_locator().set_params(integer=True)


def zero_line(ax):
    ax.axhline(0, color="black", linewidth=1)


def bars(ax, rows, x, mean, ends, **kwargs):
    """The means of rows with their intervals, joined by a line; x, mean and ends name columns."""
    means = np.array([row[mean] for row in rows])
    errors = np.abs(np.transpose([row[ends] for row in rows]) - means)  # (2, n): below, above
    ax.errorbar([row[x] for row in rows], means, errors, fmt="o-", **kwargs)


def grouped(rows, name):
    """Rows by what they have under `name` -> {value: rows}."""
    groups = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def curve(ax, lines, name, **kwargs):
    """A metric at every step of a stage."""
    ax.plot([line["step"] + 1 for line in lines], [line[name] for line in lines], ".-", **kwargs)
    whole_numbers(ax)


def plot_curves(run, results, metrics):
    """The learning curves of all stages, one panel a quantity -> curves.png."""
    figure, axes = plt.subplots(2, 4, figsize=(18, 8))
    limit = run.config.max_response
    for ax, (name, title, prefixes) in zip(axes.flat, PANELS):
        for stage, lines in grouped(metrics, "stage").items():
            if stage.startswith(prefixes):
                # ever thinner: curves that agree stay visible
                curve(ax, lines, name, label=stage, linewidth=max(1, 3.5 - len(ax.lines)))
        ax.set(title=title, xlabel="PPO iteration" if "RL" in title else "optimizer step")
        if name in ("accuracy", "eos"):
            ax.set_ylim(0, 1.05)
        if name == "length":
            ax.axhline(limit, color="black", linestyle="--", label="limit")
            ax.set_ylim(0, 1.1 * limit)
        if "0 =" in title:
            zero_line(ax)
    save(figure, run, "curves.png")


def plot_result(run, results, metrics):
    """Who beats the policy's own answers, and the gap in each of PIT's rounds -> result.png."""
    sources = run.config.rounds.split(",")
    widths = [2] + [1] * len(sources)
    figure, (left, *right) = plt.subplots(1, len(widths), width_ratios=widths)
    for row in reversed(judged_by(results, results["main"])):
        if row["b"] == "original" and "delta" in row:
            name = label(row["a"])
            left.plot(row["ci95"], [name, name], color=BLUE)
            left.plot(row["delta"], name, "o", color=BLUE)
    left.axvline(0, color="black", linewidth=1)
    left.xaxis.set_major_formatter(IN_POINTS)
    left.set(title=f"Better than the policy's own answer?\nJudged by {label(results['main'])}")
    left.set_xlabel("win - lose, in points of held-out prompts (95% interval)")
    stages = grouped(metrics, "stage")
    for number, (ax, source) in enumerate(zip(right, sources)):
        curve(ax, stages[f"pit_rl{number}"], "score")
        ax.set(title=f"Round {number}: mean gap\nover {source} answers", xlabel="PPO iteration")
        zero_line(ax)
    right[0].set_ylabel("gap by R_PIT, 0 = no change")
    save(figure, run, "result.png")


def plot_fig2(run, results, metrics):
    """The four distributions of Eq. 1, on both kinds of pairs -> fig2.png."""
    orders = {
        "lw": "worse after better\nr(l, w)",
        "ll": "worse, unchanged\nr(l, l)",
        "ww": "better, unchanged\nr(w, w)",
        "wl": "better after worse\nr(w, l)",
    }
    figure, axes = plt.subplots(1, len(results["fig2"]), sharex=True, sharey=True, squeeze=False)
    for ax, (kind, four) in zip(axes[0], results["fig2"].items()):
        scores = [four[order] for order in orders]
        ax.violinplot(scores, orientation="horizontal", widths=0.9, showmeans=True)
        ax.set_yticks(range(1, 5), orders.values())
        ax.set(title=f"Pairs: {kind} (n = {len(four['wl'])})", xlabel="score by R_PIT, in log-odds")
    figure.suptitle(
        "R_PIT's scores r(answer, reference): the top should lie right, the bottom left"
    )
    save(figure, run, "fig2.png")


def plot_fig3(run, results, metrics):
    """Delta over the original at each temperature -> fig3.png."""
    figure, ax = plt.subplots(figsize=(8, 4.6))
    for method, rows in grouped(results["fig3"], "method").items():
        bars(ax, rows, "temperature", "delta", "ci95", label=label(method))
    zero_line(ax)
    ax.yaxis.set_major_formatter(IN_POINTS)
    ax.set_title(f"One improvement against the original, judged by {label(results['main'])}")
    ax.set(xlabel="sampling temperature", ylabel="win - lose, in points (95% interval)")
    save(figure, run, "fig3.png")


def plot_rounds(run, results, metrics):
    """Table 3: Elo and mean score after each round of improvement -> rounds.png."""
    figure, (left, right) = plt.subplots(1, 2)
    original, *improved = results["table3"]
    for method, rows in grouped(improved, "method").items():
        rows = [original, *rows]
        bars(left, rows, "round", "elo", "elo_ci95", label=label(method))
        bars(right, rows, "round", "mean", "mean_ci95", label=label(method))
    y_w = results["sides"]["y_w"]["scores"][results["main"]]
    right.axhline(y_w, color=GRAY, linestyle="--", label="y_w, the annotators' better answers")
    left.set(title="Who beats whom", ylabel="Elo, original = 1000 (95% interval)")
    right.set(title=f"Judged by {label(results['main'])}", ylabel="mean score (95% interval)")
    for ax in (left, right):
        ax.set_xlabel("rounds of improvement (0 = the original)")
        whole_numbers(ax)
    save(figure, run, "rounds.png")


def plot_stops(run, results, metrics):
    """What each stop rule gives for its tokens, beside a fixed number of rounds -> stops.png."""
    rules = grouped(results["stops"], "stop")
    figure, axes = plt.subplots(1, len(rules), figsize=(14, 4.6), sharex=True, sharey=True)
    original, fixed = results["table3"][0]["mean"], rules["rounds"]
    for ax, (stop, rows) in zip(axes, rules.items()):
        ax.axhline(original, color="black", linewidth=1, label="the original")
        x, means = [row["tokens"] for row in fixed], [row["mean"] for row in fixed]
        ax.plot(x, means, color=GRAY, linewidth=5, alpha=0.4, label="no rule: all rounds")
        bars(ax, rows, "tokens", "mean", "ci95", label="this rule")
        ax.set(title=f"stop {label(stop)}", xlabel="tokens generated per answer")
    axes[0].set_ylabel(f"mean score by {label(results['main'])}")
    figure.suptitle("When to stop improving? Each point allows one more round (95% intervals)")
    save(figure, run, "stops.png", columns=1)


def plot_fig4(run, results, metrics):
    """The gap reward over PPO iterations, one line a curriculum -> fig4.png."""
    figure, ax = plt.subplots()
    ax.axhspan(-NEAR, NEAR, color=GRAY, alpha=0.4, label="no change")
    for row in results["table2"]:
        gaps = gap_curve(metrics, row["curriculum"])
        steps = range(1, len(gaps) + 1)
        smooth = [np.mean(gaps[max(0, at - 5) : at]) for at in steps]
        name = row["curriculum"].replace(",", ", then ")
        ax.plot(steps, smooth, label=name)
    ax.set_title("What each curriculum learns (named by where y_ref comes from)")
    ax.set(
        xlabel="PPO iteration, all rounds counted", ylabel="mean gap by R_PIT, over 5 iterations"
    )
    whole_numbers(ax)
    save(figure, run, "fig4.png")


# ---- the template of the page ------------------------------------------------------------------


PAGE = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
).get_template("report.md.jinja")
PAGE.globals |= dict(
    label=label,
    span=span,
    points=points,
    wrapped=wrapped,
    examples=examples,
    alarms=alarms,
    judged_by=judged_by,
    table1_claims=table1_claims,
    GAP_MODELS=GAP_MODELS,
)
