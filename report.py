"""The evidence of a run, drawn: the main tables on the console, all of them in report.md.

Measuring needs the model and is done in evaluate.py. Drawing needs only the files in the run's
folder, so a report can be drawn again at any time. Its page is the template report.md.jinja.
Everywhere Delta = win - lose, in points of held-out prompts, with its 95% interval.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import jinja2
import matplotlib
import matplotlib.ticker
import numpy as np
from rich.console import Console
from rich.markdown import Markdown

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from judges import GAP_MODELS, NEAR
from run import is_smoke, write_text
from votes import read_answers

# by Okabe and Ito: colour-blind readers can tell them apart
COLORS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"]
plt.rcParams.update(
    {
        "axes.prop_cycle": plt.cycler(color=COLORS),
        "axes.grid": True,
        "grid.alpha": 0.3,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.figsize": (12, 4.6),
        "figure.constrained_layout.use": True,
        "errorbar.capsize": 3,
    }
)
COLOR_OF = {  # of curves: a role has the same color in all panels
    "pit_sft": "C1",
    "reward_gap": "C1",
    "judge": "C2",
    "pit_rl0": "C1",
    "pit_rl1": "C2",
    "pit_rl2": "C3",
    "pit_rl3": "C4",
    "reward_gap2": "C3",
    "reward_gap3": "C4",
}
MUCH = 0.05  # five points of delta: a word must win more than this to be worth a warning
LABELS = {
    "base": "the base, asked to improve",
    "pit_sft": "PIT after SFT only",
    "pit_rl0": "PIT after round 0",
    "pit": "PIT",
    "given": "the given answers",
    "pit_given": "PIT, from the given answers",
    "best_of_2": "best of 2 answers by R_P",
    "best_of_3": "best of 3 answers by R_P",
    "self_refine": "Self-Refine",
    "self_refine_base": "Self-Refine by the base",
    "quality": "the exact rule",
    "judge": "the run's judge",
    "rounds": "after a number of rounds",
    "same": "when the text stays the same",
    "gap": "when the gap is not above 0",
} | GAP_MODELS


def ablated(curriculum):
    """How the names of a curriculum's adapters begin, in `ablate`."""
    return f"ablate_{curriculum.replace(',', '-')}_"


def label(name):
    """What figures and tables call a side, a judge, a gap model or a stop rule."""
    return LABELS.get(name, name)


# ---- the page ----------------------------------------------------------------------------------


def estimate(value, ends, form):
    """A number with its 95% interval."""
    low, high = ends
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def points(row, form="+.1f"):
    """A comparison's Delta with its interval, in points."""
    low, high = row["ci95"]
    return estimate(100 * row["delta"], [100 * low, 100 * high], form)


def judged_by(results, judge):
    """The rows of Table 1 by one judge."""
    return [row for row in results["table1"] if row["judge"] == judge]


def examples(run, judge):
    """Where a judge sees PIT's largest gain over the original, the median, and the largest loss."""
    lines = read_answers(run)
    lines.sort(key=lambda line: line["scores"][judge]["pit"] - line["scores"][judge]["original"])
    return {"Largest gain": lines[-1], "Median": lines[len(lines) // 2], "Largest loss": lines[0]}


def alarms(results):
    """The words that alone win a third of PIT's delta, and five points -> rows of "words"."""
    words = results.get("words")  # not yet, if `eval` was stopped before it
    if not words:
        return []
    delta = words["delta"]["delta"]
    most = min(2 / 3 * delta, delta - MUCH)
    return [row for row in words["rows"] if "without" in row and row["without"]["delta"] < most]


def write_report(run, voter=None):
    """Draw report.md and its figures from all results so far, and print its main tables.

    Table 1 is by the main judge or, after a vote, by the voter.
    """
    results = run.results()
    metrics = run.metrics()
    plot_curves(run, metrics)
    plot_result(run, results, metrics)
    for plot in (plot_fig2, plot_fig3, plot_stops):
        plot(run, results)
    if "table2" in results:
        plot_fig4(run, results, metrics)
    write_text(run.path / "report.md", PAGE.render(run=run, results=results))
    print_tables(run, results, voter or results["main"])


def print_tables(run, results, judge):
    """Print some blocks of the page, as a terminal shows Markdown."""
    context = PAGE.new_context(dict(run=run, results=results, judge=judge))
    for name in ("table1", "table2", "caveats", "banner"):
        Console().print(Markdown("".join(PAGE.blocks[name](context))))
    print(f"\nAll tables and figures: {run.path / 'report.md'}")


# ---- scorecard ---------------------------------------------------------------------------------


# By table of results.json: a claim, the paper's number, the rows that decide it, and which of their
# columns holds a comparison (None: the row is one)
CLAIMS = {
    "table1": [
        ("PIT beats the original", "7 to 34", dict(a="pit", b="original"), None),
        ("PIT beats Self-Refine", "-4 to 24", dict(a="pit", b="self_refine"), None),
        ("PIT beats y_w", "not said", dict(a="pit", b="y_w"), None),
        ("PIT beats PIT after SFT only", "not said", dict(a="pit", b="pit_sft"), None),
        ("PIT beats best of 2, same cost", "not said", dict(a="pit", b="best_of_2"), None),
        ("PIT beats a second sample", "not said", dict(a="pit", b="second_sample"), None),
        ("PIT beats the given answers", "not said", dict(a="pit_given", b="given"), None),
    ],
    "fig3": [
        ("temperature 0.4 beats 1", "yes", dict(method="pit", temperature=1.0), "04_over_it"),
        ("0.4 is the best temperature", "0.4-0.6", dict(method="pit"), "04_over_it"),
    ],
    "table3": [
        ("each round beats the original", "yes", dict(method="pit"), "over_original"),
        ("... and Self-Refine", "yes", dict(method="pit"), "over_self_refine"),
        ("round 2 beats round 1", "not said", dict(method="pit", round=2), "over_previous"),
    ],
    "table2": [
        ("two rounds beat round 0 alone", "13 vs 0", dict(curriculum="annotated"), "both_over_it"),
        ("two rounds beat round 1 alone", "13 vs 2", dict(curriculum="policy"), "both_over_it"),
    ],
    "eq2": [  # how often the gap is right, less how often it is wrong
        ("R_PIT ranks: annotated", "yes", dict(model="reward_gap", pairs="annotated"), None),
        (
            "R_PIT ranks: written by models",
            "not said",
            dict(model="reward_gap", pairs="written by models"),
            None,
        ),
    ],
}


def scorecard(results, judge):
    """The paper's claims, and what its readers asked, by one judge -> a list of dicts.

    What was not measured is left out. Rows that name no judge are by the main one.
    """
    card = []
    for table, claims in CLAIMS.items():
        by_judge = [r for r in results.get(table, []) if r.get("judge", results["main"]) == judge]
        for text, paper, where, column in claims:
            rows = [row for row in by_judge if where.items() <= row.items()]
            if column:
                rows = [row[column] for row in rows if column in row]
            if rows:
                card.append({"claim": text, "paper": paper} | verdict(rows))
    return card


def verdict(rows):
    """Does a claim of one or several comparisons hold? -> this run's number, the verdict.

    Of several, each number is the lowest: the claim holds if all do, and fails if one does.
    """
    low, high = np.min([row["ci95"] for row in rows], axis=0)
    delta = min(row["delta"] for row in rows)
    said = "cannot tell"
    if low > 0:
        said = "holds"
    elif high < 0:
        said = "does not hold"
    return {"ours": points({"delta": delta, "ci95": [low, high]}, "+.0f"), "verdict": said}


# ---- figures -----------------------------------------------------------------------------------


PANELS = [  # of curves.png: a metric, what it is, the stages that log it
    ("loss", "SFT: loss (nats per token)", "policy_sft|pit_sft"),
    ("accuracy", "Reward models: pairs ranked right", "reward|judge"),
    ("score", "Policy RL: mean reward by R_P", "policy_rl"),
    ("score", "PIT RL: mean gap by R_PIT (0 = no change)", "pit_rl"),
    ("kl", "RL: KL to SFT (nats per answer, 0 = same)", "policy_rl|pit_rl"),
    ("length", "RL: length of answers (tokens)", "policy_rl|pit_rl"),
    ("eos", "RL: share of answers with an end", "policy_rl|pit_rl"),
    ("explained_variance", "RL: variance explained by the critic", "policy_rl|pit_rl"),
]
IN_POINTS = matplotlib.ticker.PercentFormatter(1, decimals=0, symbol="")


@contextmanager
def drawing(run, name, *grid, figsize=None, **labels):
    """A new figure: gives its axes to the block that draws on them, then writes it.

    labels: title, xlabel, ylabel. Its legends stand below the axes, where they cover nothing.
    """
    figure, axes = plt.subplots(*grid, figsize=figsize, subplot_kw=labels)
    yield axes
    for ax in figure.axes:
        if ax.get_legend_handles_labels()[1]:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=3, frameon=False)
    figure.savefig(run.path / name)
    plt.close(figure)


def zero_line(ax):
    ax.axhline(0, color="black", linewidth=1)


def points_with_intervals(ax, rows, name, x, mean):
    """Means with their intervals, a line for each value of column `name`; x and mean: columns."""
    for value, group in grouped(rows, name).items():
        means = np.array([row[mean] for row in group])
        errors = np.abs(np.transpose([row["ci95"] for row in group]) - means)  # (2, n)
        ax.errorbar([row[x] for row in group], means, errors, fmt="o-", label=label(value))


def grouped(rows, name):
    """Rows by what they have in column `name`."""
    groups = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def curve(ax, lines, name, **kwargs):
    """A metric at every step of a stage, or of several that follow each other."""
    ax.plot(range(1, len(lines) + 1), [line[name] for line in lines], ".-", **kwargs)
    ax.xaxis.get_major_locator().set_params(integer=True)  # steps are counted: no 0.5 on the axis


def plot_curves(run, metrics):
    """The learning curves of all stages, one panel per quantity -> curves.png."""
    with drawing(run, "curves.png", 2, 4, figsize=(18, 8)) as axes:
        for ax, (name, title, stages) in zip(axes.flat, PANELS):
            for stage, lines in grouped(metrics, "stage").items():
                if re.match(stages, stage):
                    color = COLOR_OF.get(stage, "C0")
                    # alpha: curves that agree stay visible
                    curve(ax, lines, name, label=stage, color=color, alpha=0.7)
            if name == "length":
                ax.axhline(run.config.max_response, color="black", linestyle="--", label="limit")
            zero_line(ax)
            ax.set_title(title)
        axes.flat[0].figure.supxlabel("optimiser steps; in RL: PPO iterations")


def plot_result(run, results, metrics):
    """Who beats the policy's own answers, and the gap in each of PIT's rounds -> result.png."""
    with drawing(run, "result.png", 1, 2) as (left, right):
        # 1. left: deltas, in the order of LABELS, from the top to the bottom
        rows = grouped(judged_by(results, results["main"]), "b")["original"]
        order = [*LABELS]
        for row in sorted(rows, key=lambda row: order.index(row["a"]), reverse=True):
            name = label(row["a"])
            left.plot(row["ci95"], [name, name], color="C0")
            left.plot(row["delta"], name, "o", color="C0")
        left.axvline(0, color="black", linewidth=1)
        left.xaxis.set_major_formatter(IN_POINTS)
        left.set(
            title=f"Better than the policy's own answer?\nJudged by {label(results['main'])}",
            xlabel="win - lose, in points of held-out prompts (95% interval)",
        )
        # 2. right: the rounds on one scale, but on references of their own
        stages = grouped(metrics, "stage")
        for number, source in enumerate(run.config.rounds.split(",")):
            role = f"pit_rl{number}"
            name = f"round {number}, over {source} answers"
            color = COLOR_OF.get(role, "C0")
            curve(right, stages.get(role, []), "score", label=name, color=color)
        zero_line(right)
        right.set(
            title="What PIT learns from: the gap by R_PIT\n(0 = no change)",
            xlabel="PPO iteration of the round",
            ylabel="mean gap of a batch of answers",
        )


def plot_fig2(run, results):
    """The four distributions of Eq. 1, on annotated pairs -> fig2.png."""
    orders = {
        "lw": "worse after better\nr(l, w)",
        "ll": "worse, unchanged\nr(l, l)",
        "ww": "better, unchanged\nr(w, w)",
        "wl": "better after worse\nr(w, l)",
    }
    scores = [results["fig2"][order] for order in orders]
    title = "R_PIT's r(answer, reference): the top should lie right, the bottom left, the rest at 0"
    with drawing(run, "fig2.png", title=title, xlabel="score (bars: lowest, mean, highest)") as ax:
        ax.violinplot(scores, orientation="horizontal", widths=0.9, showmeans=True)
        ax.set_yticks(range(1, 5), orders.values())


def plot_fig3(run, results):
    """Delta over the original at each temperature -> fig3.png."""
    with drawing(
        run,
        "fig3.png",
        title=f"Originals at temperature 1, improved once. Judged by {label(results['main'])}",
        xlabel="sampling temperature of the improvement",
        ylabel="win - lose, in points (95% interval)",
    ) as ax:
        points_with_intervals(ax, results["fig3"], "method", "temperature", "delta")
        zero_line(ax)
        ax.yaxis.set_major_formatter(IN_POINTS)


def plot_stops(run, results):
    """What each stop rule gives for its tokens -> stops.png."""
    with drawing(
        run,
        "stops.png",
        title="When to stop improving? Each point allows one more round. "
        f"Judged by {label(results['main'])}",
        xlabel="tokens generated per answer",
        ylabel="mean score (95% interval)",
    ) as ax:
        points_with_intervals(ax, results["stops"], "stop", "tokens", "mean")
        ax.axhline(results["table3"][0]["mean"], color="black", linewidth=1, label="the original")


def plot_fig4(run, results, metrics):
    """The gap reward over PPO iterations, one line per curriculum -> fig4.png."""
    with drawing(
        run,
        "fig4.png",
        title="What each curriculum learns (named by where y_ref comes from)",
        xlabel="PPO iteration of all rounds",
        ylabel="mean gap by R_PIT",
    ) as ax:
        ax.axhspan(-NEAR, NEAR, color="lightgray", label="no change")
        for row in results["table2"]:
            name = row["curriculum"]
            lines = [line for line in metrics if line["stage"].startswith(ablated(name))]
            curve(ax, lines, "score", label=name.replace(",", ", then "))


# ---- the templates: the page of a run, and the card of an export -------------------------------


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGE = TEMPLATES.get_template("report.md.jinja")
# what the template may call
for function in (alarms, estimate, examples, is_smoke, judged_by, label, points, scorecard):
    PAGE.globals[function.__name__] = function
