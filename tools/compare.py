"""The curves of one RL stage in several runs, side by side.

python tests/compare.py runs/tiny runs/kl0 runs/collapse --stage policy_rl --plot compare.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.pyplot as plt
import typer

import report  # sets the style of all figures
from run import Run

PANELS = {
    "score": "mean reward",
    "kl": "KL to the SFT model (nats an answer)",
    "length": "length of answers (tokens)",
    "explained_variance": "variance explained by the critic",
}


def main(runs: list[Path], stage: str = "policy_rl", plot: Path = Path("compare.png")):
    figure, axes = plt.subplots(1, len(PANELS), figsize=(16, 3.6))
    for ax, (name, title) in zip(axes, PANELS.items()):
        for run in runs:
            lines = [line for line in Run(run).metrics() if line["stage"] == stage]
            ax.plot(
                [line["step"] + 1 for line in lines], [line[name] for line in lines], label=run.name
            )
        ax.set(title=title, xlabel=f"PPO iteration of {stage}")
        report.whole_numbers(ax)
        ax.set_yscale("symlog" if name == "kl" else "linear")
        if name == "explained_variance":
            ax.set_ylim(-2, 1)
    axes[0].legend()
    figure.savefig(plot)


if __name__ == "__main__":
    typer.run(main)
