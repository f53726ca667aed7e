"""How fast is an iteration of PPO, where does its time go, and how much memory does it take?

    python tests/bench.py                                                            the built-in base
    python tests/bench.py --model FOLDER --data FILE --batch 4,8,16 --lengths 24,48,96 --epochs 4

    python tests/bench.py --memory --model FOLDER                                    memory: by arithmetic, and measured

Varies the batch size at the last length, then the length at the last batch size, each in a process of its own, so that its
peak memory is its own. The work is that of policy RL: sample, score, evaluate by policy, reference and critic, update. All
answers are as long as they may be. Prints seconds by phase and tokens a second; the scaling plot goes to --plot.
"""

import json
import resource
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets  # noqa: F401  before torch
import torch
import typer
from memory import estimate_memory, plan_memory

import ppo
from data import load_pairs, shorten
from models import adamw, load_model, take_step
from pit import PRESETS
from reward import centred_gap_loss

ROLES = "policy", "reference", "reward_policy"
PHASES = "sampling", "scoring", "updating"


def measure(model, data, bits, batch, length, epochs, micro_batch, max_prompt, iterations):
    """Seconds by phase of one iteration, tokens generated a second, and the process's peak memory in GiB -> dict."""
    cfg = SimpleNamespace(
        max_response=length,
        temperature=1.0,
        micro_batch=micro_batch,
        minibatch=batch,
        epochs=epochs,
        rl_lr=1e-5,
        critic_lr=1e-3,
    )
    lm = load_model(model, bits)
    weights = sum(
        p.numel() * p.element_size() for name, p in lm.peft.named_parameters() if "lora" not in name
    )
    for role in ROLES:
        lm.add(role, head=role == "reward_policy")
    adapters = sum(p.numel() * p.element_size() for role in ROLES for p in lm.parameters(role))
    critic = torch.nn.Linear(lm.hidden_size, 1, device=lm.device)
    optimizers = (
        adamw(lm.parameters("policy"), cfg.rl_lr),
        adamw(critic.parameters(), cfg.critic_lr),
    )
    pairs, _ = load_pairs(data, 10_000, seed=0, skip_bad=True)
    cut = [
        shorten(pair.prompt, lambda turns: len(lm.encode_prompt(turns)), max_prompt)
        for pair in pairs[: 2 * batch]
    ]
    prompts = [lm.encode_prompt(prompt) for prompt in cut if prompt][:batch]
    lm.eos = lm.lm_head.weight.shape[0] - 1  # some rare token: answers end at the length
    for iteration in range(1 + iterations):
        if iteration < 2:  # the first one warms up
            seconds, started = Counter(), time.perf_counter()
        sample = ppo.rollout(
            lm,
            "policy",
            "reference",
            "reward_policy",
            critic,
            prompts,
            partial(lm.scores, "reward_policy"),
            cfg,
            seconds,
        )
        with ppo.timed(seconds, "updating"):
            ppo.ppo_update(
                lm,
                "policy",
                critic,
                optimizers,
                sample,
                ppo.normalise(sample.scores, 0, 1),
                0.05,
                1.0,
                cfg,
            )
    total = (time.perf_counter() - started) / iterations
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {phase: seconds[phase] / iterations for phase in PHASES} | {
        "total": total,
        "tokens a second": batch * length / total,
        "peak GiB": peak,
        "prompt tokens": sum(map(len, prompts)) / len(prompts),
        "all roles / base": 1 + adapters / weights,
    }


def measure_memory(model, bits, vram, answers):
    """A run's memory by arithmetic, and the peaks of one step of R_PIT and of one PPO iteration with `answers` answers, in GiB.

    All texts are as long as they may be, and random. Measured is what comes on top of the imported libraries: on a GPU what is
    allocated, else resident memory (Linux).
    """
    sizes = PRESETS["real"] | (PRESETS["small"] if vram < 6 else {})
    cfg = SimpleNamespace(
        **sizes, model=model, vram=vram, rounds="annotated,policy", temperature=1.0, epochs=1
    )
    cfg.minibatch = answers
    empty = resident("VmRSS")
    lm = load_model(model, bits)
    print(f"{model}: {lm.describe()}")
    plan_memory(lm, cfg)
    parts = list(dict.fromkeys(part for work in estimate_memory(lm, cfg).values() for part in work))
    print("| GiB | " + " | ".join([*parts, "together"]) + " |\n|---|" + "---:|" * (len(parts) + 1))
    for work, by_part in estimate_memory(lm, cfg).items():
        numbers = [f"{by_part[part]:.2f}" if part in by_part else "" for part in parts]
        print(f"| {work} | " + " | ".join([*numbers, f"{sum(by_part.values()):.2f}"]) + " |")

    def ids(n, length):
        return torch.randint(10, 1000, (n, length)).tolist()

    for role in (
        "policy",
        "reference",
        "reward_gap",
        "reward_policy",
        "judge",
        "policy_rl",
        "pit_rl0",
        "pit_rl1",
    ):
        lm.add(role, head=role == "reward_gap")
    optimizer, length = (
        adamw(lm.parameters("reward_gap"), 1e-5),
        cfg.max_prompt + cfg.max_response + 16,
    )
    with peak("a step of R_PIT", empty):
        lm.activate("reward_gap", train=True)
        candidates = [ids(2, cfg.max_response) for _ in range(cfg.micro_batch)]
        four = [
            lm.scores_of_candidates("reward_gap", ids(cfg.micro_batch, length), candidates).T
            for _ in range(2)
        ]
        centred_gap_loss(*torch.cat(four)).sum().backward()
        take_step(optimizer, 1e-5)
        del four, optimizer
    critic = torch.nn.Linear(lm.hidden_size, 1, device=lm.device)
    optimizers = (
        adamw(lm.parameters("policy"), cfg.rl_lr),
        adamw(critic.parameters(), cfg.critic_lr),
    )
    lm.eos = lm.lm_head.weight.shape[0] - 1
    with peak(f"sampling, {cfg.rl_batch} prompts and the first two tokens of each answer", empty):
        lm.generate("policy", ids(cfg.rl_batch, length), 2)
    with peak(f"PPO iteration, {answers} answers", empty):
        sample = ppo.rollout(
            lm,
            "policy",
            "reference",
            "reward_gap",
            critic,
            ids(answers, length),
            partial(lm.scores, "reward_gap"),
            cfg,
            Counter(),
        )
        ppo.ppo_update(
            lm,
            "policy",
            critic,
            optimizers,
            sample,
            ppo.normalise(sample.scores, 0, 1),
            0.05,
            1.0,
            cfg,
        )


def resident(what):
    """VmRSS, the present, or VmHWM, the most since the last reset, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 2**20


@contextmanager
def peak(what, empty):
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    Path("/proc/self/clear_refs").write_text("5")
    yield
    most = (
        torch.cuda.max_memory_allocated() / 2**30
        if torch.cuda.is_available()
        else resident("VmHWM") - empty
    )
    print(f"measured, {what}: {most:.2f} GiB", flush=True)


def main(
    model: str = "tiny",
    data: str = "synthetic",
    bits: int = 4,
    batch: str = "16,32,64,128",
    lengths: str = "8,16,32",
    epochs: int = 2,
    micro_batch: int = 64,
    max_prompt: int = 256,
    iterations: int = 2,
    plot: str = "bench.png",
    memory: bool = False,
    vram: float = 6.0,
    one: bool = False,
):
    batches, sizes = (
        [int(number) for number in numbers.split(",")] for numbers in (batch, lengths)
    )
    if memory:
        measure_memory(model, bits, vram, batches[0])
        return
    if one:
        print(
            json.dumps(
                measure(
                    model,
                    data,
                    bits,
                    batches[0],
                    sizes[0],
                    epochs,
                    micro_batch,
                    max_prompt,
                    iterations,
                )
            )
        )
        return
    runs = [(b, sizes[-1]) for b in batches] + [(batches[-1], length) for length in sizes[:-1]]
    results, columns = (
        {},
        [*PHASES, "total", "tokens a second", "peak GiB", "prompt tokens", "all roles / base"],
    )
    print("| batch | length | " + " | ".join(columns) + " |\n|" + "---:|" * (len(columns) + 2))
    for b, length in runs:
        again = [
            sys.executable,
            __file__,
            *sys.argv[1:],
            "--batch",
            str(b),
            "--lengths",
            str(length),
            "--one",
        ]
        output = subprocess.run(again, stdout=subprocess.PIPE, check=True).stdout
        found = results[b, length] = json.loads(output.splitlines()[-1])
        print(
            f"| {b} | {length} | "
            + " | ".join(f"{found[column]:.2f}" for column in columns)
            + " |",
            flush=True,
        )
    draw(results, batches, sizes, plot)


def draw(results, batches, sizes, path):
    """Seconds by phase against batch size and against length, with the straight line through 0 and the largest."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, name, numbers, rows in (
        (
            axes[0],
            f"answers an iteration, of {sizes[-1]} tokens",
            batches,
            [(b, sizes[-1]) for b in batches],
        ),
        (
            axes[1],
            f"tokens an answer, {batches[-1]} answers",
            sizes,
            [(batches[-1], length) for length in sizes],
        ),
    ):
        for phase in (*PHASES, "total"):
            ax.plot(numbers, [results[row][phase] for row in rows], marker="o", label=phase)
        ax.plot([0, numbers[-1]], [0, results[rows[-1]]["total"]], "k:", label="in proportion")
        ax.set(xlabel=name, ylabel="seconds an iteration", xlim=(0, None), ylim=(0, None))
        ax.legend()
    figure.suptitle("PPO: cost against batch size and length")
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
