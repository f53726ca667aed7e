"""What a run will cost, said before it starts: passes, tokens, memory and time of each stage.

Memory is arithmetic on the shape of the model, compared with what the device has free. Time is a
stage's tokens over the speed measured in the run's first steps. From then on each stage corrects
the estimates for later stages of its kind.
"""

import math
import time
from dataclasses import dataclass
from statistics import mean

import psutil
import torch
from tqdm import tqdm

import curriculum
from data import IMPROVE_TOKENS, max_length
from errors import UserError
from models import LOGIT_CHUNK, PREFILL, rows_at_a_time

GIB = 2**30
DESKTOP = 0.75  # GiB to leave, for a desktop and for what no arithmetic counts
EVAL_TEXTS = 23  # that the evaluation writes per prompt
SELF_REFINE_TEXTS = 24  # more with Self-Refine, which needs a model that follows instructions
# which work of `estimate_memory` the stages of each command do
WORK = {
    "sft": ["SFT, PPO update"],
    "reward": ["reward models"],
    "rl": ["SFT, PPO update", "sampling"],
    "eval": ["sampling"],
}
# time to read and to write a token, as shares of training one: fitted to the stages of one run of
# the built-in base on a CPU, and assumed for everything else until a stage of the kind is measured
READING = 0.4
WRITING = 2.5
clock = tqdm.format_interval  # seconds -> "01:02" or "1:02:03"


# ---- memory ------------------------------------------------------------------------------------


def free_memory():
    """GiB free on the GPU, or on the machine if it has no GPU or one that shares its memory."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free / GIB
    return psutil.virtual_memory().available / GIB


def estimate_memory(lm, cfg):
    """Peak memory, from the shape of the model -> {work: {part: GiB}}.

    At all times there are the weights, the adapters of all roles, and for the one in training its
    gradients and AdamW's two moments; adapters are in fp32. What each kind of work adds:

    training   what the backward pass needs, for each token of a micro-batch (or of a batch, where
               that is smaller). In one layer of width D that is ten vectors of D (the input, two
               normed copies, q, k, v, the attention's output twice, the second norm's input, a
               spare) and four of the feed-forward's width W, and the inputs of the LoRA matrices
               again, in fp32. With checkpointing, only the layers' inputs are kept, and one layer
               at a time is in full.
    logits     of LOGIT_CHUNK tokens: themselves, their log-softmax, its gradient, in fp32.
    sampling   PREFILL tokens of each prompt at a time, in one layer; keys and values of all tokens.
    """
    base = lm.base
    shape = base.config.get_text_config()
    size = lm.lm_head.weight.element_size()  # bytes per number
    D = shape.hidden_size
    layers = shape.num_hidden_layers
    W = getattr(shape, "intermediate_size", None) or 4 * D
    heads = shape.num_attention_heads
    kv_heads = getattr(shape, "num_key_value_heads", None) or heads
    head_dim = getattr(shape, "head_dim", None) or D // heads
    length = max_length(cfg)
    rows = rows_at_a_time(cfg)
    texts = min(cfg.micro_batch, max(cfg.sft_batch, cfg.minibatch))
    pairs = min(cfg.micro_batch, cfg.rm_batch)

    # some adapters are already there. In the end there are "blank", two of SFT, three reward
    # models, policy_rl, and PIT's rounds
    lora = sum(4 * matrix.numel() for matrix in lm.weights("blank").values())
    weights = base.get_memory_footprint(return_buffers=False) - len(lm.roles) * lora
    roles = 7 + len(cfg.rounds.split(","))
    always = {"weights": weights, "adapters": roles * lora, "optimiser, gradients": 3 * lora}

    layer = size * (10 * D + 4 * W)  # bytes that one layer keeps of one token
    if size < 4:  # LoRA at q, k, v, o, gate and up reads D numbers, at down W
        layer += 4 * (6 * D + W)
    kept = layers * layer
    if base.is_gradient_checkpointing:
        kept = layers * D * size + layer
    # R_PIT reads (x, y_w) and (x, y_l), each with both answers, in one row or in two
    pair = 2 * (length + cfg.max_response) if lm.shared_row else 4 * length
    read_ahead = min(PREFILL, length - cfg.max_response)
    cache = 2 * size * layers * kv_heads * head_dim
    work = {
        "SFT, PPO update": {
            "activations": texts * length * kept,
            "logits": 3 * 4 * LOGIT_CHUNK * shape.vocab_size,
        },
        "reward models": {"activations": pairs * pair * kept},
        "sampling": {
            "activations": rows * read_ahead * (size * (5 * D + 2 * W) + 2 * 4 * W),
            "keys and values": rows * length * cache,
        },
    }
    for kind, parts in work.items():
        work[kind] = {part: number / GIB for part, number in (always | parts).items()}
    return work


def totals(work):
    """The GiB of each kind of work, all parts together."""
    return {kind: sum(parts.values()) for kind, parts in work.items()}


def plan_memory(lm, cfg):
    """Say what training will take, and recompute layers in the backward pass if memory is short."""
    work = estimate_memory(lm, cfg)
    # what is free, and what is there already: the weights, some adapters; --vram may allow less
    there = lm.base.get_memory_footprint(return_buffers=False) / GIB
    room = min(free_memory() + there, cfg.vram or math.inf)
    if max(totals(work).values()) > room - DESKTOP:
        lm.checkpoint_layers()
        work = estimate_memory(lm, cfg)
    # the work that takes most
    gib = totals(work)
    kind = max(gib, key=gib.get)
    parts = ", ".join(f"{part} {number:.2f}" for part, number in work[kind].items())
    print(f"memory: about {gib[kind]:.1f} of {room:.1f} GiB at most, in {kind}: {parts}")
    if gib[kind] > room:
        print("  That is too much. Lower --micro-batch and --rl-batch.")
    # does the longest text fit into the context?
    shape = lm.base.config.get_text_config()
    context = getattr(shape, "max_position_embeddings", None)
    longest = max_length(cfg) + cfg.max_response + 64  # Self-Refine: feedback, and two requests
    if context and longest > context:
        raise UserError(
            f"{cfg.model} reads {context} tokens, but the longest text has {longest}: lower "
            "--max-prompt or --max-response."
        )


# ---- work --------------------------------------------------------------------------------------


@dataclass
class Stage:
    """What a stage has to do: rows to go through, and tokens per row."""

    name: str
    kind: str  # the command that runs it
    passes: float  # over its part of the data
    rows: int
    # mean tokens per row:
    trained: float  # read, with a backward pass
    read: float = 0  # scored
    written: int = 0  # sampled, padding included
    memory: float = 0  # GiB
    seconds: float = 0  # measured, or projected from its steps so far

    def work(self):
        """Its work, in units of the time to train one token."""
        return self.rows * (self.trained + READING * self.read + WRITING * self.written)


def plan_stages(cfg, x, y, pairs):
    """The stages of a run -> [Stage].

    x, y: mean tokens of a prompt and of an answer. pairs: how many there are in each part.
    """
    sft = cfg.sft_steps * cfg.sft_batch
    rm = cfg.rm_steps * cfg.rm_batch
    rl = cfg.rl_steps * cfg.rl_batch
    R = cfg.max_response
    answer = x + y
    prompt = answer + IMPROVE_TOKENS  # (x, y_ref)
    improved = prompt + y
    both = x + 2 * y  # x with both answers, as R_P reads a pair
    four = 2 * (prompt + 2 * y)  # (x, y_w) and (x, y_l), each with both answers, as R_PIT does

    def train(name, kind, part, rows, **tokens):
        """A stage that goes through `rows` of a part of the pairs."""
        return Stage(name, kind, rows / pairs[part], rows, **tokens)

    stages = [
        train("policy_sft", "sft", "sft", rows=sft, trained=answer),
        train("pit_sft", "sft", "sft", rows=sft, trained=improved),
        train("reward_policy", "reward", "rm", rows=rm, trained=both),
        train("reward_gap", "reward", "rm", rows=rm, trained=four),
        train("judge", "reward", "judge", rows=rm, trained=both),
        # read by the reward model, the policy and the reference
        train(
            "policy_rl",
            "rl",
            "rl",
            rows=rl,
            trained=cfg.epochs * answer,
            read=3 * answer,
            written=R,
        ),
    ]
    rounds = curriculum.rounds(cfg.rounds.split(","), curriculum.round_steps(cfg), "pit_rl")
    for role, source, _, steps in rounds:
        # one more reading: R_PIT also scores y_ref itself ("no change")
        stage = train(
            role,
            "rl",
            "rl",
            rows=steps * cfg.rl_batch,
            trained=cfg.epochs * improved,
            read=4 * improved,
            written=R,
        )
        if source == "annotated":  # each pair serves twice
            stage.passes /= 2
        elif source != "given":  # y_ref is written, too
            stage.written = 2 * R
        stages.append(stage)
    # each text is read by a judge of answers, and by R_PIT
    texts = EVAL_TEXTS
    if cfg.model != "tiny":
        texts += SELF_REFINE_TEXTS
    if "given" in cfg.rounds:  # PIT's improvement of them
        texts += 1
    rows = min(cfg.eval_n, pairs["held_out"]) * texts
    stages.append(Stage("eval", "eval", 0, rows=rows, trained=0, read=answer + improved, written=R))
    return stages


# ---- time --------------------------------------------------------------------------------------


class Plan:
    """The stages of a run, and how long they take by what has been measured so far."""

    def __init__(self, stages):
        self.stages = stages

    def begin(self, name):
        """Begin a stage -> its number, as a prefix: "[3 of 9] "."""
        names = [stage.name for stage in self.stages]
        number = names.index(name)
        self.stage = self.stages[number]
        self.ends = []  # when each of its steps ended
        return f"[{number + 1} of {len(names)}] "

    def measured(self):
        return [stage for stage in self.stages if stage.seconds]

    def expect(self, stage):
        """Seconds that a stage takes: measured, or at the speed of its kind, or else of all."""
        if stage.seconds:
            return stage.seconds
        known = self.measured()
        alike = [other for other in known if other.kind == stage.kind] or known
        per_token = sum(other.seconds for other in alike) / sum(other.work() for other in alike)
        return per_token * stage.work()

    def total(self):
        """Seconds for all stages."""
        return sum(self.expect(stage) for stage in self.stages)

    def left(self):
        """Seconds for all stages of which nothing has been measured."""
        return sum(self.expect(stage) for stage in self.stages if not stage.seconds)

    def end_step(self, done, total):
        """Learn from a step of the current stage -> the time left for all stages, in words."""
        self.ends.append(time.perf_counter())
        n_steps = len(self.ends) - 1  # without the first, which is slower: caches are cold
        if not n_steps:
            return ""
        per_step = (self.ends[-1] - self.ends[0]) / n_steps
        first = not self.measured()
        self.stage.seconds = per_step * total
        if first:
            tqdm.write(self.table())
        return f"all: {clock(per_step * (total - done) + self.left())} left"

    def end_stage(self, seconds):
        """Learn how long the current stage took, and say what all stages take."""
        self.stage.seconds = seconds or 0.1  # rounded to tenths by run.py; 0 is "not measured"
        print(f"  took {clock(seconds)} of {clock(self.total())} for all stages")

    def table(self):
        """The plan for people; with times as soon as something has been measured."""
        lines = [
            "  (passes over the pairs; tokens; memory without that of the libraries)",
            "  stage          passes  trained     read  written   memory     time",
        ]
        for stage in self.stages:
            line = f"  {stage.name:14}{stage.passes:7.1f}"
            for per_row in (stage.trained, stage.read, stage.written):
                line += f"{stage.rows * per_row / 1000:8,.0f}k"
            line += f"{stage.memory:5.1f} GiB"
            if self.measured():
                line += f"{clock(self.expect(stage)):>9}"
            lines.append(line)
        if self.measured():
            lines.append(f"  {'all':57}{clock(self.total()):>9}")
        return "\n".join(lines)


def make_plan(lm, run, parts, commands):
    """Plan what these commands have to do for a run, and print it -> Plan."""
    pairs = parts["rl"][:200]
    x = mean(len(lm.encode_prompt(pair.prompt)) for pair in pairs)
    y = mean(len(lm.encode_response(pair.chosen)) for pair in pairs)
    seconds = run.results().get("time_s", {})
    gib = totals(estimate_memory(lm, run.config))
    stages = []
    for stage in plan_stages(run.config, x, y, {name: len(part) for name, part in parts.items()}):
        if stage.kind not in commands:
            continue
        stage.memory = max(gib[work] for work in WORK[stage.kind])
        if run.done(stage.name):
            stage.seconds = seconds.get(stage.name, 0)
            if not stage.seconds:  # it took no time: taken over from another run (--from)
                continue
        stages.append(stage)
    plan = Plan(stages)
    print(plan.table())
    return plan
