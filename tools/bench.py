"""How fast is PPO, what does a step of each stage take, and how much memory?

    python tools/bench.py speed                    seconds per PPO iteration
    python tools/bench.py stages --model FOLDER    one step of each stage: time, tokens, memory
    python tools/bench.py make FOLDER              random weights, Qwen2-0.5B's shape, for `stages`
    python tools/bench.py hours                    the default job on two GPUs, by assumed speeds

`speed` does the work of policy RL: sample, score, evaluate by policy, reference and critic, update.
It varies the batch size at the last length, then the length at the last batch size. Each setting
has a process to itself, so that its peak memory is its own. `stages` calls the very functions that
a run calls, on random texts that are as long as the options allow.
"""

import inspect
import io
import random
import resource
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets  # noqa: F401  on Windows it must be imported before torch
import torch
import typer
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import curriculum
import pit
import ppo
import reward
import sft
from data import PARTS, Pair, load_pairs, max_length, shorten
from models import TINY, adamw, load_model, zero_head
from plan import Plan, estimate_memory, plan_memory, plan_stages

app = typer.Typer(add_completion=False, help=__doc__, pretty_exceptions_enable=False)
PHASES = ("sampling", "scoring", "updating")
COLUMNS = (*PHASES, "total", "tokens per second", "peak GiB", "prompt tokens", "all roles / base")
GIB = 2**30
# for `hours`, not measured: tokens per second that Qwen2-0.5B trains in 4-bit (a T4 has no bf16,
# and computes in fp32), and mean tokens of a prompt and of an answer in HH
ASSUMED_SPEED = {"laptop RTX 4060": 2600, "T4": 1250}
ASSUMED_LENGTHS = (150, 65)


# ---- speed -------------------------------------------------------------------------------------


@app.command()
def speed(
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
):
    """Seconds per PPO iteration, by phase, and a figure of how they grow."""
    batches = [int(number) for number in batch.split(",")]
    sizes = [int(number) for number in lengths.split(",")]
    settings = [(b, sizes[-1]) for b in batches] + [(batches[-1], length) for length in sizes[:-1]]
    results = {}
    print("| batch | length | " + " | ".join(COLUMNS) + " |\n|" + "---:|" * (len(COLUMNS) + 2))
    spawn = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for b, length in settings:
            cfg = SimpleNamespace(
                max_response=length,
                temperature=1.0,
                micro_batch=micro_batch,
                minibatch=b,
                epochs=epochs,
                rl_lr=1e-5,
                critic_lr=1e-3,
                kl=0.05,
            )
            job = pool.submit(measure, model, data, bits, b, max_prompt, iterations, cfg)
            found = results[b, length] = job.result()
            numbers = " | ".join(f"{found[column]:.2f}" for column in COLUMNS)
            print(f"| {b} | {length} | {numbers} |", flush=True)
    draw(results, batches, sizes, plot)


def measure(model, data, bits, batch, max_prompt, iterations, cfg):
    """One setting: seconds by phase per iteration, tokens per second, peak memory -> dict."""
    lm = load_model(model, bits)
    weights = size_of(p for name, p in lm.peft.named_parameters() if "lora" not in name)
    for role in ("policy", "reference", "reward_policy"):
        lm.add(role, head=role == "reward_policy")
    adapters = size_of(p for role in sorted(lm.roles - {"blank"}) for p in lm.parameters(role))
    critic = zero_head(lm.hidden_size, lm.device)
    optimizers = (
        adamw(lm.parameters("policy"), cfg.rl_lr),
        adamw(critic.parameters(), cfg.critic_lr),
    )
    prompts = some_prompts(lm, data, batch, max_prompt)
    never_end(lm)

    seconds = defaultdict(float)
    for iteration in range(1 + iterations):
        if iteration == 1:  # the first one warms up
            seconds.clear()
        ppo_iteration(lm, critic, optimizers, prompts, cfg, seconds)
    per_iteration = {phase: seconds[phase] / iterations for phase in PHASES}
    total = sum(per_iteration.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / GIB
    return per_iteration | {
        "total": total,
        "tokens per second": batch * cfg.max_response / total,
        "peak GiB": peak,
        "prompt tokens": sum(map(len, prompts)) / len(prompts),
        "all roles / base": 1 + adapters / weights,
    }


def ppo_iteration(lm, critic, optimizers, prompts, cfg, seconds):
    """The same calls as in ppo.train, timed."""
    score = lm.scores_from_states
    with timed(seconds, "sampling"):
        tokens = lm.generate("policy", prompts, cfg.max_response)
    with timed(seconds, "scoring"):
        roles = dict(policy="policy", reference="reference", reward_role="reward_policy")
        sample = ppo.rate(lm, tokens, score, critic=critic, cfg=cfg, **roles)
    with timed(seconds, "updating"):
        scores = ppo.normalise(sample.scores, 1)
        models = (lm, "policy", critic, optimizers)
        ppo.ppo_update(*models, sample, scores, decay=1.0, cfg=cfg)


def some_prompts(lm, data, n, longest):
    """n prompts of a data set, cut to `longest` tokens -> lists of token ids."""
    pairs = load_pairs(data, 10_000, seed=0, skip_bad=True)
    prompts = []
    for pair in pairs:
        short = shorten(pair.prompt, lm, longest)
        if short and len(prompts) < n:
            prompts.append(lm.encode_prompt(short))
    return prompts


def never_end(lm):
    """Make EOS a token that is hardly ever sampled: every answer is as long as it may be."""
    lm.eos = lm.lm_head.weight.shape[0] - 1


def size_of(tensors):
    return sum(p.numel() * p.element_size() for p in tensors)


@contextmanager
def timed(seconds, phase):
    """Add the seconds that the block takes to seconds[phase]."""
    started = time.perf_counter()
    yield
    seconds[phase] += now() - started


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # the GPU may still be computing when Python goes on
    return time.perf_counter()


def draw(results, batches, sizes, path):
    """Seconds by phase against batch size, and against length -> a figure.

    The dotted line goes through 0 and the largest setting: cost in proportion.
    """
    import matplotlib.pyplot as plt

    panels = [
        (
            f"answers per iteration, {sizes[-1]} tokens each",
            batches,
            [(b, sizes[-1]) for b in batches],
        ),
        (
            f"tokens per answer, {batches[-1]} answers",
            sizes,
            [(batches[-1], size) for size in sizes],
        ),
    ]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for ax, (name, numbers, rows) in zip(axes, panels):
        for phase in (*PHASES, "total"):
            ax.plot(numbers, [results[row][phase] for row in rows], marker="o", label=phase)
        ax.plot([0, numbers[-1]], [0, results[rows[-1]]["total"]], "k:", label="in proportion")
        ax.set(xlabel=name, ylabel="seconds per iteration", xlim=(0, None), ylim=(0, None))
        ax.legend()
    figure.suptitle("PPO: cost against batch size and length")
    figure.savefig(path)


# ---- stages ------------------------------------------------------------------------------------


class Stopwatch:
    """Stands in for a run: has its options, keeps nothing, and times the steps."""

    def __init__(self, config):
        self.config = config
        self.seconds = 0.0  # of the last step; the steps before it have warmed up

    @contextmanager
    def stage(self, name, why):
        self.name = name
        yield

    def steps(self, total, optimizers, state=None):
        for step in range(total):
            started = now()
            yield step
            self.seconds = now() - started

    def load_trained(self, lm, role):
        return role in lm.roles

    def results(self):
        return {}

    def keep(self, lm, role): ...

    def log(self, **metrics): ...

    def warn(self, text): ...

    def add_results(self, **parts): ...


@app.command()
def stages(
    model: str = "tiny",
    bits: int = 4,
    vram: float = None,
    batch: int = 0,
    steps: int = 2,
):
    """One step of every stage at the default sizes, after a step that warms up.

    --batch makes every batch that small, for a machine that is slow.
    """
    cfg = default_options(model, vram, sft_steps=steps, rm_steps=steps, rl_steps=steps)
    if batch:
        cfg.sft_batch = cfg.rm_batch = cfg.rl_batch = cfg.minibatch = batch
    empty = resident("VmRSS")
    lm = load_model(model, bits)
    print(f"{model}: {lm.describe()}")
    plan_memory(lm, cfg)
    print_plan(estimate_memory(lm, cfg))
    never_end(lm)
    rows = max(cfg.sft_batch, cfg.rm_batch, cfg.rl_batch)
    pairs = [random_pair(lm, cfg, seed) for seed in range(rows)]

    run = Stopwatch(cfg)
    print("\n| stage | seconds per step | tokens per step | tokens per second | peak GiB |")
    print("|---|---:|---:|---:|---:|")
    for name, tokens, train in all_stages(lm, run, pairs):
        forget_peak()
        with redirect_stdout(io.StringIO()):  # accuracies mean nothing here
            train()
        speed = tokens / run.seconds
        print(
            f"| {name} | {run.seconds:.1f} | {tokens:,} | {speed:,.0f} | {peak(empty):.2f} |",
            flush=True,
        )


def default_options(model, vram=None, **changes):
    """The options that `python pit.py all --model MODEL --vram VRAM` would have, with changes."""
    signature = inspect.signature(pit.run_all)
    options = {name: option.default for name, option in signature.parameters.items()}
    options = pit.fill_in(options | {"model": model, "vram": vram}, smoke=False)
    return SimpleNamespace(**options | changes)


def random_pair(lm, cfg, seed):
    """A pair whose texts are as long as they may be: compass words, one token each."""
    rng = random.Random(seed)

    def text(tokens):
        words = rng.choices("north east south west".split(), k=2 * tokens)
        while len(lm.encode_response(" ".join(words))) > tokens:
            words.pop()
        return " ".join(words)

    chat = [{"role": "user", "content": text(cfg.max_prompt)}]
    prompt = shorten(chat, lm, cfg.max_prompt)
    return Pair(prompt, text(cfg.max_response), text(cfg.max_response))


def all_stages(lm, run, pairs):
    """-> [(name, tokens that a step reads, or in RL writes, function that trains)]."""
    cfg, held_out = run.config, pairs[:1]
    x, y = cfg.max_prompt, cfg.max_response
    improve = max_length(cfg) - y  # x, y_ref, "Please improve your answer."
    round_of = partial(curriculum.train_pit_round, lm, run, pairs)
    round_0 = dict(role="pit_rl0", source="annotated", start="pit_sft", steps=cfg.rl_steps)
    round_1 = dict(role="pit_rl1", source="policy", start="pit_rl0", steps=cfg.rl_steps)
    return [
        ("policy_sft", cfg.sft_batch * (x + y), partial(sft.train_policy, lm, run, pairs)),
        ("pit_sft", cfg.sft_batch * (improve + y), partial(sft.train_pit, lm, run, pairs)),
        # two answers per pair after one context, then after two
        (
            "reward_policy",
            cfg.rm_batch * (x + 2 * y),
            partial(reward.train_policy_reward, lm, run, pairs, held_out),
        ),
        (
            "reward_gap",
            cfg.rm_batch * 2 * (improve + 2 * y),
            partial(reward.train_gap_reward, lm, run, pairs, held_out),
        ),
        ("policy_rl", cfg.rl_batch * y, partial(curriculum.train_policy_rl, lm, run, pairs)),
        ("pit_rl0", cfg.rl_batch * y, partial(round_of, **round_0)),
        # the policy writes y_ref first
        ("pit_rl1", 2 * cfg.rl_batch * y, partial(round_of, **round_1)),
    ]


def print_plan(estimate):
    """The plan's memory as a table: a row per kind of work, a column per part."""
    parts = list(dict.fromkeys(part for work in estimate.values() for part in work))
    print("| planned GiB | " + " | ".join(parts) + " | together |")
    print("|---|" + "---:|" * (len(parts) + 1))
    for work, by_part in estimate.items():
        numbers = [f"{by_part[part]:.2f}" if part in by_part else "" for part in parts]
        print(f"| {work} | " + " | ".join(numbers) + f" | {sum(by_part.values()):.2f} |")


def resident(what):
    """VmRSS, the memory in use, or VmHWM, the most since the last reset, in GiB; Linux only."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kib = [int(line.split()[1]) for line in lines if line.startswith(what)]
    return kib[0] * 1024 / GIB if kib else float("nan")


def forget_peak():
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(empty):
    """Most memory since `forget_peak`, in GiB: on a GPU allocated, else resident above `empty`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resident("VmHWM") - empty


@app.command()
def hours():
    """The plan of `python pit.py all --model Qwen2-0.5B` on two kinds of GPU, by assumed speeds."""
    cfg = default_options("Qwen2-0.5B", vram=8)
    pairs = {name: share * cfg.pairs for name, share in PARTS.items()}
    stages = plan_stages(cfg, *ASSUMED_LENGTHS, pairs)
    for device, speed in ASSUMED_SPEED.items():
        print(f"{device}, {speed:,} tokens trained per second:")
        stages[0].seconds = stages[0].work() / speed
        print(Plan(stages).table())


@app.command()
def make(folder: Path):
    """A model of Qwen2-0.5B's shape with random weights, and the tokenizer of the built-in base."""
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        dtype="bfloat16",
    )
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)


if __name__ == "__main__":
    app()
