"""The curves of one RL stage in several runs, in one figure.

python tools/compare.py runs/tiny runs/kl0 runs/collapse --stage policy_rl --plot compare.png
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import typer

sys.path.insert(0, str(Path(__file__).parents[1]))

from errors import UserError
from run import Run

PANELS = {
    "score": "mean reward",
    "kl": "KL to the SFT model (nats per answer)",
    "length": "length of answers (tokens)",
    "explained_variance": "variance explained by the critic",
}


def main(runs: list[Path], stage: str = "policy_rl", plot: Path = Path("compare.png")):
    """Draw reward, KL, length and the critic's explained variance of each run."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(16, 3.6), layout="constrained")
    for run in runs:
        lines = lines_of(run, stage)
        iterations = [line["step"] + 1 for line in lines]
        for ax, name in zip(axes, PANELS):
            ax.plot(iterations, [line[name] for line in lines], label=run.name)
    for ax, (name, title) in zip(axes, PANELS.items()):
        ax.set(title=title, xlabel=f"PPO iteration of {stage}")
        ax.xaxis.get_major_locator().set_params(integer=True)
        # a collapse is a hundred times a healthy KL, and an awful critic far below zero
        if name == "kl":
            ax.set_yscale("symlog")
        if name == "explained_variance":
            ax.set_ylim(-2, 1)
    axes[0].legend()
    figure.savefig(plot)


def lines_of(run, stage):
    """The lines of a run's metrics.jsonl that belong to an RL stage; UserError without any."""
    lines = [line for line in Run(run).metrics() if line["stage"] == stage]
    if not lines or "kl" not in lines[0]:
        raise UserError(f"{run} has no RL stage {stage}.")
    return lines


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        sys.exit(f"Error: {error}")
