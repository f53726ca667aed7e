"""The command line. `all` chains the stages of PIT; the other commands run one stage of a run, or use its result.

    python pit.py all                                  the built-in tiny base and task: minutes on a CPU, no download
    python pit.py all --smoke                          the same in miniature: every stage, under a minute
    python pit.py infer --run runs/tiny "..."          an answer to a prompt like those in samples.md, and better ones

The signature of `all` is the configuration: every option is written to runs/NAME/config.json, and the other commands read it
from there. Options that depend on the size of the base are None here and filled in from PRESETS.
"""

import inspect
import re
import signal
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

if __name__ == "__main__":
    signal.signal(
        signal.SIGINT, signal.SIG_DFL
    )  # Ctrl-C while the libraries load, which takes seconds: no traceback

import curriculum
import evaluate
import infer as inference
import plan
import report
import reward
import sft
from data import fingerprint, load_pairs, load_parts, split
from errors import UserError, explain
from files import BadRow, read_rows, read_turns, real_text
from judges import adapter_judge, judges_by_name
from models import export, load_model
from run import Run, new_folder, seed_all

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

PRESETS = {
    # a 1M-parameter base bears, and needs, learning rates ten to fifty times those of real models
    "tiny": dict(
        data="synthetic",
        pairs=12_000,
        max_prompt=48,
        max_response=30,
        sft_steps=60,
        sft_lr=1.5e-3,
        rm_steps=100,
        rm_lr=3e-3,
        rl_steps=16,
        rl_batch=64,
        minibatch=32,
        rl_lr=1e-3,
        critic_lr=1e-2,
        kl=0.15,
        micro_batch=64,
        eval_n=256,
    ),
    "real": dict(
        data="hh",
        pairs=20_000,
        max_prompt=384,
        max_response=128,
        sft_steps=600,
        sft_lr=1e-4,
        rm_steps=600,
        rm_lr=1e-4,
        rl_steps=150,
        rl_batch=64,
        minibatch=32,
        rl_lr=2e-5,
        critic_lr=1e-3,
        kl=0.05,
        micro_batch=8,
        eval_n=256,
    ),
    "small": dict(max_prompt=256, max_response=96, rl_batch=32, micro_batch=4),  # --vram below 6
    "smoke": dict(
        pairs=400, sft_steps=4, rm_steps=4, rl_steps=2, rl_batch=16, minibatch=8, eval_n=16
    ),
}

NOT_STORED = {"run", "smoke", "overwrite"}  # options of `all` that say how to start, not what to do


def option(panel, text, **kwargs):
    return typer.Option(help=text, rich_help_panel=panel, **kwargs)


@app.command(name="all")
def run_all(
    run: Annotated[
        Optional[Path], option("Run", "Folder of the run. [dim](default: runs/MODEL)[/dim]")
    ] = None,
    smoke: Annotated[
        bool, option("Run", "Everything in miniature: to see that it works, not to learn anything.")
    ] = False,
    overwrite: Annotated[
        bool,
        option("Run", "Start anew where the folder holds a run, and lose what it has learned."),
    ] = False,
    save_every: Annotated[int, option("Run", "Steps from one checkpoint to the next.", min=1)] = 10,
    seed: Annotated[
        int, option("Run", "Seed of data, sampling and initialisation.", min=0, max=2**63 - 1)
    ] = 0,
    model: Annotated[
        str, option("Model", "tiny (built in), Qwen2-0.5B, a local folder, a hub id.")
    ] = "tiny",
    bits: Annotated[int, option("Model", "4: NF4 through bitsandbytes; 16: no quantisation.")] = 4,
    lora_r: Annotated[int, option("Model", "Rank of every adapter.", min=1)] = 16,
    lora_alpha: Annotated[int, option("Model", "Scale of every adapter: alpha / r.", min=1)] = 32,
    vram: Annotated[
        float, option("Model", "Memory of the GPU in GiB; below 6, lengths are shorter too.", min=2)
    ] = 6,
    target_modules: Annotated[
        str, option("Model", "Layers with adapters: all-linear, or a pattern.")
    ] = "all-linear",
    data: Annotated[
        Optional[str],
        option("Data", "synthetic, hh, tldr, hub id, file (.json, .jsonl, .csv, .parquet)."),
    ] = None,
    pairs: Annotated[Optional[int], option("Data", "Use at most this many pairs.", min=80)] = None,
    skip_bad: Annotated[
        bool, option("Data", "Go on without rows that are not pairs, and count them.")
    ] = False,
    max_prompt: Annotated[
        Optional[int], option("Data", "Longest prompt in tokens; the oldest turns are cut.", min=8)
    ] = None,
    max_response: Annotated[
        Optional[int], option("Data", "Longest answer in tokens; others are left out.", min=4)
    ] = None,
    sft_steps: Annotated[
        Optional[int], option("SFT", "Optimiser steps of each SFT stage.", min=1)
    ] = None,
    sft_lr: Annotated[Optional[float], option("SFT", "Learning rate.", min=0)] = None,
    sft_batch: Annotated[int, option("SFT", "Pairs a step.", min=1)] = 32,
    keep_better: Annotated[
        float, option("SFT", "Weight beta of the term -log M(y_w | x, y_w).", min=0)
    ] = 0.0,
    unlikelihood: Annotated[
        float, option("SFT", "Weight gamma of the term -log(1 - M(y_l | x, y_w)).", min=0)
    ] = 0.0,
    rm_steps: Annotated[
        Optional[int], option("Reward models", "Optimiser steps of each reward model.", min=1)
    ] = None,
    rm_lr: Annotated[Optional[float], option("Reward models", "Learning rate.", min=0)] = None,
    rm_batch: Annotated[int, option("Reward models", "Pairs a step.", min=1)] = 32,
    rounds: Annotated[
        str, option("RL", "Sources of y_ref, one round each: annotated, policy, sft.")
    ] = "annotated,policy",
    rl_steps: Annotated[
        Optional[int], option("RL", "PPO iterations of each RL stage.", min=1)
    ] = None,
    rl_batch: Annotated[Optional[int], option("RL", "Answers an iteration.", min=2)] = None,
    rl_lr: Annotated[Optional[float], option("RL", "Learning rate of the policy.", min=0)] = None,
    critic_lr: Annotated[
        Optional[float], option("RL", "Learning rate of the critic.", min=0)
    ] = None,
    kl: Annotated[Optional[float], option("RL", "Weight beta of the KL penalty.", min=0)] = None,
    target_kl: Annotated[
        float, option("RL", "KL (nats an answer) that beta adapts to; 0: fixed beta.", min=0)
    ] = 0.0,
    epochs: Annotated[int, option("RL", "Passes over each iteration's answers.", min=1)] = 2,
    minibatch: Annotated[Optional[int], option("RL", "Answers an update.", min=1)] = None,
    micro_batch: Annotated[
        Optional[int], option("RL", "Sequences in memory at one time.", min=1)
    ] = None,
    temperature: Annotated[
        float, option("RL", "Sampling temperature, in rollouts and their log-probs.", min=0.01)
    ] = 1.0,
    eval_n: Annotated[Optional[int], option("Evaluation", "Held-out prompts.", min=8)] = None,
):
    """Run every stage of PIT, or continue a run where it stopped.

    Example: python pit.py all --model FOLDER --data pairs.jsonl --run runs/mine
    """
    options = {name: value for name, value in locals().items() if name not in NOT_STORED}
    if bits not in (4, 16):
        raise UserError(f"--bits {bits}: choose 4 or 16.")
    curriculum.parse(rounds)
    preset = PRESETS["tiny" if model == "tiny" else "real"]
    preset = (
        preset
        | (PRESETS["small"] if vram < 6 and model != "tiny" else {})
        | (PRESETS["smoke"] if smoke else {})
    )
    for name, value in preset.items():
        if options[name] is None:
            options[name] = value
    folder = run or Path("runs") / (Path(model).resolve().name + ("-smoke" if smoke else ""))
    session = Session(Run.start(folder, options, overwrite))
    for stage in (sft_stage, reward_stage, rl_stage, eval_stage):
        stage(session)


def load_base(cfg, model=None, bits=None):
    return load_model(
        model or cfg.model,
        bits or cfg.bits,
        cfg.lora_r,
        cfg.lora_alpha,
        cfg.target_modules,
        cfg.seed,
    )


class Session:
    """What the stages of one process share: the run, the base loaded once, the pairs dealt out."""

    def __init__(self, run):
        self.run, cfg = run, run.config
        run.hold()
        pairs, notes = load_pairs(cfg.data, cfg.pairs, cfg.seed, cfg.skip_bad)
        run.pin("data fingerprint", fingerprint(pairs))
        split(pairs, cfg.seed, notes)  # fail early: are there enough pairs?
        self.lm = load_base(cfg)
        print(f"{cfg.model}: {self.lm.describe()}")
        if cfg.model != "tiny":
            plan.plan_memory(self.lm, cfg)
        self.parts = load_parts(cfg, self.lm, pairs, notes)
        self.rounds = curriculum.parse(cfg.rounds)
        self.last = f"pit_rl{len(self.rounds) - 1}"
        self.iterations = cfg.rl_steps * len(self.rounds)  # of PPO for PIT, all rounds together

    def show(self, role):
        """Answer a few held-out prompts with what has been trained so far."""
        inference.show_samples(self.lm, self.run, role, self.parts["held_out"][:3])

    def require(self, *commands):
        """Load the roles that earlier commands have trained."""
        trained = {
            "sft": ("policy_sft", "pit_sft"),
            "reward": ("reward_policy", "reward_gap", "judge"),
            "rl": ("policy_rl", "pit_rl0", self.last),
        }
        for command in commands:
            for role in trained[command]:
                self.run.need(role, command)
                self.run.load_trained(self.lm, role)


def sft_stage(session):
    lm, run, pairs = session.lm, session.run, session.parts["sft"]
    sft.train_policy(lm, run, pairs)
    session.show("policy_sft")
    sft.train_pit(lm, run, pairs)
    session.show("pit_sft")


def reward_stage(session):
    lm, run, parts = session.lm, session.run, session.parts
    reward.train_policy_reward(lm, run, parts["rm"], parts["held_out"])
    reward.train_gap_reward(lm, run, parts["rm"], parts["held_out"])
    reward.train_policy_reward(lm, run, parts["judge"], parts["held_out"], role="judge")


def rl_stage(session):
    lm, run, pairs = session.lm, session.run, session.parts["rl"]
    session.require("sft", "reward")
    curriculum.train_policy_rl(lm, run, pairs)
    session.show("policy_rl")
    for role, source, start, steps in curriculum.rounds(
        session.rounds, session.iterations, "pit_rl"
    ):
        curriculum.train_pit_round(lm, run, pairs, role, source, start, steps)
        session.show(role)


def eval_stage(session, judges=None, judge_base=None):
    lm, run, parts = session.lm, session.run, session.parts
    for role in filter(run.done, evaluate.GAP_MODELS):  # those of `ablate` too
        run.load_trained(lm, role)
    cfg = run.config
    judges = judges or judges_by_name([], lm, cfg)
    if judge_base:  # trained like the run's own judge, on the same pairs
        role, other = "judge_" + re.sub(r"\W+", "_", judge_base), load_base(cfg, model=judge_base)
        plan.plan_memory(other, cfg)
        reward.train_policy_reward(other, run, parts["judge"], parts["held_out"], role)
        judges[role] = adapter_judge(other, role, cfg)
    with run.stage("eval", "who beats whom, on held-out prompts"):
        evaluate.evaluate(lm, run, parts["held_out"], session.last, judges)
    report.write_report(run)


def open_run(path):
    """An existing run; its config.json may be of a version that had fewer options."""
    opened = Run(path)
    if (
        missing := inspect.signature(run_all).parameters.keys()
        - vars(opened.config).keys()
        - NOT_STORED
    ):
        raise UserError(
            f"{path / 'config.json'} is of another version: no {', '.join(sorted(missing))}. Start a new --run."
        )
    return opened


StageRun = Annotated[Path, typer.Option(help="Folder of a run that `all` has started.")]


@app.command(name="sft")
def sft_command(run: StageRun):
    """Stage 1 of a run: M_P^SFT and M_PIT^SFT. Example: python pit.py sft --run runs/tiny"""
    sft_stage(Session(open_run(run)))


@app.command(name="reward")
def reward_command(run: StageRun):
    """Stage 2 of a run: R_P, R_PIT and the judge. Example: python pit.py reward --run runs/tiny"""
    reward_stage(Session(open_run(run)))


@app.command(name="rl")
def rl_command(run: StageRun):
    """Stage 3 of a run: PPO for the policy, then for PIT, round by round. Example: python pit.py rl --run runs/tiny"""
    rl_stage(Session(open_run(run)))


Judges = Annotated[
    Optional[list[str]],
    typer.Option("--judge", help="quality, judge, folder or hub id; the first decides."),
]


@app.command(name="eval")
def eval_command(
    run: StageRun,
    judge: Judges = None,
    judge_base: Annotated[
        Optional[str], typer.Option(help="Train one more judge on this base: folder or hub id.")
    ] = None,
):
    """Judge a run again: scorecard, tables, figures. Example: python pit.py eval --run runs/tiny --judge judge"""
    session = Session(open_run(run))
    session.require("sft", "reward", "rl")
    eval_stage(session, judges_by_name(judge, session.lm, session.run.config), judge_base)


@app.command()
def ablate(run: StageRun, judge: Judges = None):
    """Train the paper's curricula and the variants of Eq. 2, and compare: Table 2, Fig. 4, and the report with them.

    Example: python pit.py ablate --run runs/tiny
    """
    session = Session(open_run(run))
    session.require("sft", "reward", "rl")
    judges = judges_by_name(
        judge, session.lm, session.run.config
    )  # named wrongly? better said before the training
    lm, run, parts = session.lm, session.run, session.parts
    for role, loss_of in (("reward_gap2", reward.gap_loss), ("reward_gap3", reward.three_terms)):
        name = evaluate.GAP_MODELS[role]
        reward.train_gap_reward(lm, run, parts["rm"], parts["held_out"], role, loss_of, name)
    lasts = {}
    for name in curriculum.CURRICULA:
        prefix = f"ablate_{name.replace(',', '-')}_"
        for role, source, start, steps in curriculum.rounds(
            curriculum.parse(name), session.iterations, prefix
        ):
            curriculum.train_pit_round(lm, run, parts["rl"], role, source, start, steps)
            session.show(role)
            lasts[name] = role
    with session.run.stage("ablate", "which curriculum is best?"):
        evaluate.judge_curricula(lm, run, parts["held_out"], lasts, judges)
    print(report.table2(session.run.results()["table2"]))
    eval_stage(session, judges)


def check_request(prompt, response, input, output, stop):
    """Complain about options of the command `infer` that do not go together."""
    if (
        (prompt is None) == (input is None)
        or (input is None) != (output is None)
        or input
        and response
    ):
        raise UserError(
            "Give either a prompt (and --response, if you like), or both --input and --output."
        )
    if output and output.suffix == ".gz":
        raise UserError(
            f"--output {output}: it is written as plain text, so that it can go on where it stopped. Leave out .gz."
        )
    for name, text in (("the prompt", prompt), ("--response", response)):
        try:
            if text is not None and not real_text(text, name):
                raise BadRow(f"{name} is empty")
        except BadRow as error:
            raise UserError(
                f"{error}. Say what to answer; without --response the policy answers first."
            ) from None
    if stop not in inference.STOPS or stop == "time" and input:
        raise UserError(
            f"--stop {stop}: choose one of {', '.join(inference.STOPS)}; time is not for whole files."
        )


@app.command(name="infer")
def infer_command(
    run: StageRun,
    prompt: Annotated[Optional[str], typer.Argument(help="What to answer.")] = None,
    response: Annotated[
        Optional[str], typer.Option(help="Improve this text instead of the policy's own answer.")
    ] = None,
    input: Annotated[
        Optional[Path],
        typer.Option(help="A file of rows with `prompt`, and `response` if you have one."),
    ] = None,
    output: Annotated[
        Optional[Path],
        typer.Option(help="Where the rows of --input go, as .jsonl; continued if begun."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How many times to improve.", min=1)] = 3,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0 takes the likeliest token.", min=0)
    ] = 0.4,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0)] = 0,
    stop: Annotated[
        str,
        typer.Option(
            help="Stop early at gap (no gain), same (text unchanged), time; rounds: never."
        ),
    ] = "gap",
    seconds: Annotated[
        float, typer.Option(help="Start no more rounds after this long, with --stop time.", min=0)
    ] = 60.0,
):
    """Answer a prompt, or a file of prompts, and improve the answers round by round.

    Example: python pit.py infer --run runs/tiny --input prompts.jsonl --output improved.jsonl
    """
    check_request(prompt, response, input, output, stop)
    opened = open_run(run)
    cfg = opened.config
    roles = "policy_rl", (last := f"pit_rl{len(curriculum.parse(cfg.rounds)) - 1}"), "reward_gap"
    for role in roles:
        opened.need(role, "all")
    if input:
        rows = read_rows(input)
        print(
            f"{input}: {len(rows):,} rows, {inference.rows_done(output, rows, rounds):,} of them in {output} already"
        )
    lm = load_base(cfg)
    for role in roles:
        lm.load(role, opened.adapter(role))
    if input:
        inference.improve_file(
            lm, "policy_rl", last, rows, output, cfg, rounds, temperature, seed, stop
        )
        return
    seed_all(seed, "infer")
    turns = inference.fit_prompt(lm, read_turns(prompt, "prompt"), response, cfg, "the prompt")
    steps = inference.iterate(
        lm, "policy_rl", last, turns, cfg, rounds, temperature, response, stop, seconds
    )
    for k, (text, gap) in enumerate(steps):
        print(f"original        {text}" if k == 0 else f"round {k}  {gap:+5.2f}  {text}")
    if k < rounds:
        print(f"the answer is that of round {k}: --stop {stop}")


def check_export(run, role, folder, merge):
    """Complain about a role that cannot be exported like this, and a folder that is there already."""
    if Path(role).name != role or role in ("", ".."):
        raise UserError(
            f"--adapter {role}: give the name of a role, such as pit_rl1 or policy_rl, not a path."
        )
    run.need(role, "all")
    if folder.exists():
        raise UserError(f"--to {folder} is there already. Give a new folder.")
    if merge and (run.adapter(role) / "head.safetensors").exists():
        raise UserError(
            f"{role} is a scalar head on an adapter, not a model that writes: leave out --merge."
        )


@app.command(name="export")
def export_command(
    run: StageRun,
    adapter: Annotated[str, typer.Option(help="Which role, such as pit_rl1 or policy_rl.")],
    to: Annotated[Path, typer.Option(help="A new folder.")],
    merge: Annotated[
        bool, typer.Option(help="A whole transformers model, without need of peft.")
    ] = False,
):
    """Write a role for other programs: as a PEFT adapter, or with --merge as a whole model.

    Example: python pit.py export --run runs/tiny --adapter pit_rl1 --to improver --merge
    """
    opened = open_run(run)
    check_export(opened, adapter, to, merge)
    lm = load_base(opened.config, bits=16)  # merged into 4-bit weights, the logits would move
    with new_folder(to) as folder:
        export(lm, adapter, opened.adapter(adapter), folder, merge)
    print(
        f"{to}: {adapter} of {run}, {'merged into' if merge else 'an adapter for'} {opened.config.model}"
    )


def main():
    sys.stdout.reconfigure(
        errors="backslashreplace"
    )  # a console that does not know a letter shows its number
    try:
        return app()
    except Exception as error:
        text = explain(error)
        if text is None:
            raise
    print(f"Error: {text}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
