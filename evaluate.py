"""Who beats whom: judges, win / lose / Delta with 95% intervals, the learning curves, the report.

An answer to each held-out prompt is sampled once for each side, and every comparison looks at the same answers. Two judges:
the exact quality, where the task is the synthetic one, and a Bradley-Terry model trained on pairs that no reward model saw.
"""

from textwrap import shorten

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

import infer
from data import quality
from run import seed_all, write_text

SAME = 1e-4  # judges' scores closer than this are a tie: equal texts in different batches differ by rounding


def compare(a, b, resamples=2000, seed=0):
    """Scores of two sides for the same n prompts -> n, win, lose, tie, delta = win - lose, its 95% interval.

    The interval is a paired bootstrap: prompts are drawn with replacement, and both sides' scores go with their prompt.
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    outcome = np.where(np.abs(difference) < SAME, 0, np.sign(difference))  # (n,) in {-1, 0, 1}
    draws = np.random.default_rng(seed).integers(len(outcome), size=(resamples, len(outcome)))
    low, high = np.quantile(outcome[draws].mean(1), [0.025, 0.975])
    return {
        "n": len(outcome),
        "win": (outcome > 0).mean().item(),
        "lose": (outcome < 0).mean().item(),
        "tie": (outcome == 0).mean().item(),
        "delta": outcome.mean().item(),
        "ci95": [low.item(), high.item()],
    }


def write_answers(lm, run, pairs, last):
    """Every side's answer to every held-out prompt -> {side: texts}. `last` is the adapter of PIT's last round."""
    cfg = run.config
    prompts = [pair.prompt for pair in pairs]
    sides = {"y_w": [pair.chosen for pair in pairs]}
    jobs = [
        ("original", "policy_rl"),
        ("second_sample", "policy_rl"),
        ("pit_sft", "pit_sft"),
        ("pit_rl0", "pit_rl0"),
        ("pit", last),
    ]
    for step in run.steps(len(jobs)):  # each side is seeded by its own number
        side, role = jobs[step]
        if role == "policy_rl":
            sides[side] = infer.answer(lm, role, prompts, cfg)
        else:
            sides[side] = infer.improve(lm, role, prompts, sides["original"], cfg)
    sides["best_of_2"] = infer.best_of_n(lm, prompts, [sides["original"], sides["second_sample"]], cfg)
    return sides


COMPARISONS = [
    *[("original", "y_w"), ("pit_sft", "original"), ("pit_rl0", "original"), ("pit", "original"), ("best_of_2", "original")],
    *[("pit", "pit_sft"), ("pit", "pit_rl0"), ("pit", "best_of_2")],
]


def evaluate(lm, run, pairs, last):
    """Write, judge and compare all sides on held-out pairs -> results.json; prints the table."""
    cfg = run.config
    pairs = pairs[: cfg.eval_n]
    prompts = [pair.prompt for pair in pairs]
    sides = write_answers(lm, run, pairs, last)
    judged = {"judge": {side: infer.rewards(lm, "judge", prompts, texts, cfg).tolist() for side, texts in sides.items()}}
    if cfg.data == "synthetic":
        judged["quality"] = {
            side: [quality(prompt[-1]["content"], text) for prompt, text in zip(prompts, texts)]
            for side, texts in sides.items()
        }
    rows = []
    for judge in reversed(judged):
        for a, b in COMPARISONS:
            rows.append({"a": a, "b": b, "judge": judge} | compare(judged[judge][a], judged[judge][b]))
    means = {judge: {side: float(np.mean(scores)) for side, scores in by_side.items()} for judge, by_side in judged.items()}
    lengths = {side: float(np.mean([len(lm.encode_response(text)) for text in texts])) for side, texts in sides.items()}
    run.add_results(table1=rows, mean_score=means, mean_tokens=lengths)
    print(table(rows))
    for judge, by_side in means.items():
        print(f"mean by {judge}: " + "  ".join(f"{side} {mean:.2f}" for side, mean in by_side.items()))


def table(rows):
    """Comparisons as text that is also Markdown; all but n in percent."""
    lines = ["| judge   | a         | b         |   n |  win | lose |  tie | delta | 95% interval   |",
             "|---------|-----------|-----------|-----|------|------|------|-------|----------------|"]  # fmt: skip
    for r in rows:
        low, high = (100 * end for end in r["ci95"])
        lines.append(
            f"| {r['judge']:7} | {r['a']:9} | {r['b']:9} | {r['n']:3} | {100 * r['win']:4.0f} | {100 * r['lose']:4.0f} "
            f"| {100 * r['tie']:4.0f} | {100 * r['delta']:+5.1f} | {low:+5.1f} to {high:+5.1f} |"
        )
    return "\n".join(lines)


LABELS = {
    "pit_sft": "PIT after SFT only", "pit_rl0": "PIT after round 0", "pit": "PIT", "best_of_2": "best of 2 answers by R_P",
}  # fmt: skip


def write_report(run):
    """All results so far as a page for people -> report.md, with its two figures beside it."""
    plot_curves(run)
    plot_result(run)
    results = run.results()
    parts = [
        f"# {run.path.name}",
        "",
        "![result](result.png)",
        "",
        "Delta = win - lose, in points; intervals by paired bootstrap over prompts.",
        "",
        table(results["table1"]),
    ]
    for judge, means in results["mean_score"].items():
        parts += ["", f"Mean score by {judge}: " + ", ".join(f"{side} {mean:.3f}" for side, mean in means.items())]
    parts += ["", "Mean length in tokens: " + ", ".join(f"{side} {mean:.1f}" for side, mean in results["mean_tokens"].items())]
    for role, measured in results["reward"].items():
        parts += ["", f"{role} on held-out pairs: " + ", ".join(f"{name} {value:.3f}" for name, value in measured.items())]
    parts += ["", "Seconds: " + ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in results["time_s"].items())]
    parts += ["", "![learning curves](curves.png)", ""]
    write_text(run.path / "report.md", "\n".join(parts))


PANELS = [("loss", "SFT: loss (nats a token)", ("policy_sft", "pit_sft")),
          ("accuracy", "Reward models: training accuracy", ("reward_policy", "reward_gap", "judge")),
          ("score", "Policy RL: mean reward R_P", ("policy_rl",)),
          ("score", "PIT RL: mean gap R_PIT (0 = no change)", ("pit_rl",)),
          ("kl", "RL: KL to SFT (nats an answer)", ("policy_rl", "pit_rl")),
          ("length", "RL: answer length (tokens)", ("policy_rl", "pit_rl")),
          ("eos", "RL: share of answers that end", ("policy_rl", "pit_rl")),
          ("explained", "RL: variance explained by critic", ("policy_rl", "pit_rl"))]  # fmt: skip


def plot_curves(run):
    """All stages' learning curves, one panel a quantity -> curves.png."""
    lines = run.metrics()
    figure, axes = plt.subplots(2, 4, figsize=(18, 7), layout="constrained")
    for ax, (name, title, prefixes) in zip(axes.flat, PANELS):
        for stage in dict.fromkeys(line["stage"] for line in lines if line["stage"].startswith(prefixes)):
            points = [(line["step"], line[name]) for line in lines if line["stage"] == stage and name in line]
            ax.plot(*zip(*points), label=stage)
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend()
    figure.savefig(run.path / "curves.png", dpi=100)
    plt.close(figure)


def plot_result(run):
    """The result in one picture: who beats the policy's own answers, and the gap reward over PIT's rounds -> result.png."""
    table1 = run.results()["table1"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), layout="constrained")
    rows = [row for row in table1 if row["b"] == "original" and row["judge"] == table1[0]["judge"]][::-1]
    delta = 100 * np.array([row["delta"] for row in rows])
    low, high = 100 * np.array([row["ci95"] for row in rows]).T
    left.errorbar(delta, range(len(rows)), xerr=[delta - low, high - delta], fmt="o", capsize=4)
    left.set_yticks(range(len(rows)), [LABELS[row["a"]] for row in rows])
    left.set(title="Better than the policy's own answer?", xlabel="win - lose, points of held-out prompts (95% interval)")
    left.set_ylim(-0.5, len(rows) - 0.5)
    left.axvline(0, color="gray", linewidth=1)
    lines = [line for line in run.metrics() if line["stage"].startswith("pit_rl")]
    for number, source in enumerate(run.config.rounds.split(",")):
        points = [(at, line["score"]) for at, line in enumerate(lines) if line["stage"] == f"pit_rl{number}"]
        right.plot(*zip(*points), label=f"round {number}: {source} answers")
    right.axhline(0, color="gray", linewidth=1)
    right.set(title="How much better than what it was given?", xlabel="PPO iteration", ylabel="gap reward (0 = no change)")
    right.legend()
    for ax in (left, right):
        ax.grid(alpha=0.3)
    figure.savefig(run.path / "result.png", dpi=100)
    plt.close(figure)


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
