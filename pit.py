"""The command line. `all` runs the stages of PIT; the others run one of them, or use a run.

    python pit.py all                          built-in base and task: minutes on a CPU, no download
    python pit.py all --smoke                  every stage in miniature, to see that it works
    python pit.py infer --run runs/tiny "..."  answer a prompt like those in samples.md, and improve

The signature of `all` is the configuration: its options go to runs/NAME/config.json, where the
other commands read them. An option whose default depends on the base is None in the signature, and
is filled in from PRESETS.

The libraries take seconds to import, so each function imports only what it needs: `--help` and
typos are answered at once.
"""

import inspect
import os
import re
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import typer

from errors import UserError, explain

StopRule = Literal["gap", "same", "rounds"]  # as infer.STOPS, whose import takes seconds
SOURCES = ("annotated", "policy", "sft", "given")  # of y_ref, see curriculum.py
NOT_STORED = {"ctx", "run", "smoke", "overwrite", "from_run", "until"}  # how `all` starts
PRESETS = {
    "tiny": dict(
        data="synthetic",
        pairs=12_000,
        max_prompt=48,  # the longest prompt of the task has 44 tokens, the longest answer 30
        max_response=30,
        save_every=10,
        micro_batch=64,
        eval_n=256,
        sft_steps=60,
        sft_batch=32,
        sft_lr=1.5e-3,  # 1M parameters tolerate, and need, ten to fifty times a real model's rate
        rm_steps=100,
        rm_batch=32,
        rm_lr=3e-3,
        rl_steps=16,
        rl_batch=64,
        minibatch=32,
        rl_lr=1e-3,
        critic_lr=1e-2,
        kl=0.15,
    ),
    "real": dict(
        data="hh",
        pairs=32_000,  # of 160,000 in HH; each stage goes over its share about once
        max_prompt=384,  # holds most dialogues of HH-RLHF; PIT reads that and two answers
        max_response=128,
        save_every=10,
        micro_batch=8,
        eval_n=256,
        sft_steps=250,
        sft_batch=32,
        sft_lr=1e-4,
        rm_steps=250,  # one pass: reward models overfit after one or two
        rm_batch=32,
        rm_lr=1e-4,
        rl_steps=100,
        rl_batch=64,
        minibatch=32,
        rl_lr=2e-5,
        critic_lr=1e-3,
        kl=0.05,
    ),
    # less than 5 GiB free, such as a card of 4: shorter texts, fewer at a time
    "small": dict(max_prompt=256, max_response=96, rl_batch=32, micro_batch=4),
    # The fewest steps in which every stage logs, saves and shows something. SmolLM2-135M with
    # HH-RLHF took seven minutes on one CPU core that had other work too, most of it for evaluation.
    "smoke": dict(
        pairs=2_000,  # of HH, nine in ten have an answer of more than 32 tokens, and are dropped
        max_prompt=64,
        max_response=32,
        save_every=1,
        eval_n=2,  # with 47 texts per prompt
        sft_steps=2,
        sft_batch=2,
        rm_steps=2,
        rm_batch=2,
        rl_steps=2,
        rl_batch=2,
        minibatch=2,
        micro_batch=2,
    ),
}

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def option(kind, text, panel=None, *names, **limits):
    """The type of an option, with its help, its limits, and the panel of --help it stands in."""
    return Annotated[kind, typer.Option(*names, help=text, rich_help_panel=panel, **limits)]


def check_rounds(rounds):
    for source in rounds.split(","):
        if source not in SOURCES:
            raise typer.BadParameter(f"{source!r} is not one of {', '.join(SOURCES)}.")
    return rounds


@app.command(name="all")
def run_all(
    ctx: typer.Context = None,
    run: option(
        Path, "The run's folder (default: runs/MODEL, or runs/MODEL-smoke).", "Run", file_okay=False
    ) = None,
    smoke: option(bool, "Every stage in miniature, to see that it works.", "Run") = False,
    overwrite: option(bool, "Replace the run in that folder.", "Run") = False,
    from_run: option(Path, "A run: reuse its options and adapters.", "Run", "--from") = None,
    until: option(Literal["sft", "reward", "rl", "eval"], "The last stage to run.", "Run") = "eval",
    save_every: option(int, "Steps between checkpoints.", "Run", min=1) = None,
    seed: option(int, "Seed for data, sampling, initialisation.", "Run", min=0, max=2**32) = 0,
    model: option(str, "tiny (built in), Qwen2-0.5B, a local folder, a hub id.", "Model") = "tiny",
    bits: option(Literal[4, 16], "4: NF4 by bitsandbytes. 16: not quantised.", "Model") = 4,
    lora_r: option(int, "Rank of each adapter.", "Model", min=1, max=512) = 16,
    lora_alpha: option(int, "Scale of each adapter: alpha / r.", "Model", min=1, max=4096) = 32,
    vram: option(float, "Memory in GiB (default: what is free).", "Model", min=1, max=4096) = None,
    target_modules: option(
        str, "Layers with adapters: all-linear, or a pattern.", "Model"
    ) = "all-linear",
    data: option(str, "synthetic (built in), hh, tldr, a file, a folder, a hub id.", "Data") = None,
    columns: option(str, "Your columns: prompt=A,chosen=B,rejected=C.", "Data") = None,
    pairs: option(int, "Use at most this many pairs.", "Data", min=80) = None,
    skip_bad: option(bool, "Leave out rows that are not pairs.", "Data") = False,
    max_prompt: option(int, "Longest prompt in tokens; older turns are cut.", "Data", min=8) = None,
    max_response: option(
        int, "Longest answer in tokens, with its EOS; longer pairs are dropped.", "Data", min=4
    ) = None,
    sft_steps: option(int, "Steps of each SFT stage.", "SFT", min=1) = None,
    sft_lr: option(float, "Learning rate.", "SFT", min=0, max=1) = None,
    sft_batch: option(int, "Pairs per step.", "SFT", min=1) = None,
    rm_steps: option(int, "Steps of each reward model.", "Reward models", min=1) = None,
    rm_lr: option(float, "Learning rate.", "Reward models", min=0, max=1) = None,
    rm_batch: option(int, "Pairs per step.", "Reward models", min=1) = None,
    rounds: option(
        str, f"Who writes y_ref, by round: {', '.join(SOURCES)}.", "RL", callback=check_rounds
    ) = "annotated,policy",
    rl_steps: option(int, "PPO iterations of each RL stage.", "RL", min=1) = None,
    last_steps: option(
        int, "PPO iterations of the last round (default: --rl-steps).", "RL", min=1
    ) = None,
    rl_batch: option(int, "Answers per iteration.", "RL", min=2) = None,
    rl_lr: option(float, "Learning rate of the policy.", "RL", min=0, max=1) = None,
    critic_lr: option(float, "Learning rate of the critic.", "RL", min=0, max=1) = None,
    kl: option(float, "Weight beta of the KL penalty.", "RL", min=0, max=1000) = None,
    epochs: option(int, "Passes over each iteration's answers.", "RL", min=1) = 2,
    minibatch: option(int, "Answers per update.", "RL", min=1) = None,
    micro_batch: option(int, "Sequences in memory at a time.", "RL", min=1) = None,
    temperature: option(float, "For PPO's samples and log-probs.", "RL", min=0.01, max=2) = 1.0,
    eval_n: option(int, "Held-out prompts.", "Evaluation", min=2) = None,
):
    """Run every stage of PIT, or continue a run where it stopped.

    Example: python pit.py all --model FOLDER --data pairs.jsonl --run runs/mine
    """
    start(**locals())


def start(ctx, run, smoke, overwrite, from_run, until, **options):
    """What `all` does: the named arguments are those in NOT_STORED; options go to config.json."""
    from run import Run, learned, read_config

    if from_run:
        if not run:
            raise UserError("--from needs a folder for the new run: --run NEW")
        config = read_config(from_run)
        names = options.keys() & config.keys()
        if smoke:  # a run in miniature has its own sizes
            names -= PRESETS["smoke"].keys() | {"last_steps"}
        for name in names:  # what was not typed is as in that run
            if ctx.get_parameter_source(name).name == "DEFAULT":
                options[name] = config[name]
    options["model"] = options["model"].rstrip("/")
    model = Path(options["model"]).resolve()
    if model == Path(__file__).with_name("tiny"):
        options["model"] = "tiny"
    folder = run or Path("runs") / (model.name + ("-smoke" if smoke else ""))

    # fail early: check the options, the model's name and the data before the base is loaded
    if learned(folder) and not overwrite:
        # continued with more or less free memory, a run keeps its presets
        old = read_config(folder)
        for name in {"vram"} | PRESETS["small"].keys() - {"micro_batch"}:
            options[name] = options[name] or old.get(name)
    options = fill_in(options, smoke)
    if options["columns"] and options["data"] == "synthetic":
        raise UserError("--columns names the columns of your --data: give that, too.")
    if options["model"] == "tiny" and options["data"] != "synthetic":
        print("Warning: the built-in base knows the built-in task only. For your data: --model")
    started = Run.start(folder, options, overwrite, from_run)
    if is_finished(started):
        print(f"{folder} is finished. Its report: {folder / 'report.md'}")
        return

    import models
    import plan

    models.check_model(options["model"])
    lm, run, parts = prepare(started)
    run.begin()  # and only now may an old run move aside
    stages = {"sft": sft_stage, "reward": reward_stage, "rl": rl_stage, "eval": eval_stage}
    commands = list(stages)[: list(stages).index(until) + 1]
    run.plan = plan.make_plan(lm, run, parts, commands)
    for command in commands:
        stages[command](lm, run, parts)


def fill_in(options, smoke):
    """The options of `all`, each None filled in from PRESETS."""
    given = {name: value for name, value in options.items() if value is not None}
    preset = PRESETS["tiny"]
    if options["model"] != "tiny":
        import plan

        vram = options["vram"] or round(plan.free_memory(), 1)
        preset = PRESETS["real"] | {"vram": vram}
        if vram < 5:
            preset = preset | PRESETS["small"]
    if smoke:
        preset = preset | PRESETS["smoke"]
    return options | preset | given


def is_finished(run):
    """Whether a run that `all` is to continue has nothing left to do."""
    stages = [*run.results().get("time_s", {})]  # in the order in which they ended
    if run.replace or "eval" not in stages:
        return False
    since = stages[stages.index("eval") + 1 :]
    roles = run.trained_by()
    if any(role in since for role in roles):  # trained again
        return False
    return (run.path / "report.md").exists() and all(map(run.done, roles))


def improver(cfg):
    """The role that improves answers: PIT's last round."""
    last = len(cfg.rounds.split(",")) - 1
    return f"pit_rl{last}"


# ---- the stages --------------------------------------------------------------------------------


def load_base(run, roles=(), bits=None):
    """The base of a run, with its kind of adapters, and with these trained roles -> LM."""
    from models import load_model

    run.check(roles)  # before the base takes its time
    cfg = run.config
    lm = load_model(
        name=cfg.model,
        bits=bits or cfg.bits,
        lora_r=cfg.lora_r,
        lora_alpha=cfg.lora_alpha,
        target_modules=cfg.target_modules,
        seed=cfg.seed,
    )
    for role in roles:
        run.load(lm, role)
    return lm


def prepare(run, roles=()):
    """What the stages share -> the base, loaded once, with roles; the run; the pairs, split."""
    import curriculum
    import data
    import plan

    cfg = run.config
    pairs = data.load_pairs(cfg.data, cfg.pairs, cfg.seed, cfg.skip_bad, cfg.columns)
    run.pin_data(data.fingerprint(pairs))
    curriculum.check_given(cfg.rounds.split(","), pairs)
    lm = load_base(run, roles)
    print(f"{cfg.model}: {lm.describe()}")
    if cfg.model != "tiny":
        plan.plan_memory(lm, cfg)
    parts = data.load_parts(cfg, lm, pairs)
    run.lock()  # model and data are good: only now does a new run get its folder
    # enough to measure the accuracy of a reward model
    parts["held_out"] = parts["held_out"][: 8 * cfg.eval_n]
    return lm, run, parts


def show(lm, run, parts, role):
    """Answer a few held-out prompts with what has been trained so far."""
    import chat

    chat.show_samples(lm, run, role, parts["held_out"][:3])


def sft_stage(lm, run, parts):
    """Stage 1 -> policy_sft, pit_sft."""
    import sft

    sft.train_policy(lm, run, parts["sft"])
    show(lm, run, parts, "policy_sft")
    sft.train_pit(lm, run, parts["sft"])
    show(lm, run, parts, "pit_sft")


def reward_stage(lm, run, parts):
    """Stage 2 -> reward_policy, reward_gap, judge."""
    import reward

    reward.train_policy_reward(lm, run, parts["rm"], parts["held_out"])
    reward.train_gap_reward(lm, run, parts["rm"], parts["held_out"])
    reward.train_policy_reward(lm, run, parts["judge"], parts["held_out"], role="judge")


def rl_stage(lm, run, parts):
    """Stage 3 -> policy_rl, and pit_rl0, pit_rl1, ... by round."""
    import curriculum

    curriculum.train_policy_rl(lm, run, parts["rl"])
    show(lm, run, parts, "policy_rl")
    train_rounds(lm, run, parts, run.config.rounds, "pit_rl")


def train_rounds(lm, run, parts, sources, prefix):
    """PIT's rounds, one per source of y_ref (SOURCE,SOURCE) -> the adapter of the last one."""
    import curriculum

    writers = sources.split(",")
    iterations = curriculum.round_steps(run.config)
    if sources != run.config.rounds:  # another curriculum: as many in all
        iterations = curriculum.share_out(sum(iterations), len(writers))
    for role, source, start, steps in curriculum.rounds(writers, iterations, prefix):
        curriculum.train_pit_round(
            lm, run, parts["rl"], role=role, source=source, start=start, steps=steps
        )
        show(lm, run, parts, role)
    return role


def eval_stage(lm, run, parts, judges=None, lasts=None):
    """Judge and compare on held-out prompts; judges and lasts: see evaluate.evaluate."""
    import evaluate
    import report
    import votes
    import words
    from judges import GAP_MODELS, default_judges, judges_by_name

    for role in GAP_MODELS:
        run.load_trained(lm, role)  # `ablate` may have trained more of them
    judges = judges or judges_by_name(default_judges(run.config), lm, run.config)
    with run.stage("eval", "who beats whom, on held-out prompts"):
        evaluate.evaluate(lm, run, parts["held_out"], improver(run.config), judges, lasts)
        training = parts["sft"] + parts["rm"] + parts["rl"]
        main = next(iter(judges.values()))
        run.add_results(words=words.measure(votes.read_answers(run), training, main))
    report.write_report(run)


# ---- commands on a run -------------------------------------------------------------------------


def open_run(path):
    """An existing run; UserError where a version with other options began it."""
    from run import FACTS, Run

    opened = Run(path)
    options = inspect.signature(run_all).parameters.keys() - NOT_STORED
    if vars(opened.config).keys() - {*FACTS, "data fingerprint"} != options:
        raise UserError(f"{path} is a run of another version. Start a new --run.")
    return opened


RunFolder = option(Path, "Folder of a run that `all` has started.")
JudgeNames = option(list[str], "quality, judge, FILE.py, folder, hub id; the first one decides.")


@app.command(name="sft")
def sft_command(run: RunFolder):
    """Stage 1 of a run: learn to answer, and to improve (M_P^SFT, M_PIT^SFT).

    Example: python pit.py sft --run runs/tiny
    """
    sft_stage(*prepare(open_run(run)))


@app.command(name="reward")
def reward_command(run: RunFolder):
    """Stage 2 of a run: the reward models R_P and R_PIT, and the judge.

    Example: python pit.py reward --run runs/tiny
    """
    reward_stage(*prepare(open_run(run)))


@app.command(name="rl")
def rl_command(run: RunFolder):
    """Stage 3 of a run: PPO for the policy, then for PIT, round by round.

    Example: python pit.py rl --run runs/tiny
    """
    roles = ["policy_sft", "pit_sft", "reward_policy", "reward_gap"]
    rl_stage(*prepare(open_run(run), roles))


def open_to_judge(path, names):
    """What `prepare` gives for a run that has been trained, and the judges that --judge names."""
    import votes
    from judges import check_names, default_judges, judges_by_name

    run = open_run(path)
    names = names or default_judges(run.config)
    check_names(names, run.config)  # misspelt ones are refused at once
    voters = votes.read_votes(run)
    for name in names:
        if name in voters:
            raise UserError(
                f"--judge {name}: votes.jsonl of {path} has a voter of that name. Use another path."
            )
    roles = run.trained_by()
    if "judge" not in names:  # the run's own judge may be missing where it has no say
        del roles["judge"]
    lm, run, parts = prepare(run, roles)
    return lm, run, parts, judges_by_name(names, lm, run.config)


@app.command(name="eval")
def eval_command(run: RunFolder, judge: JudgeNames = None):
    """Judge a run again: scorecard, tables, figures.

    Example: python pit.py eval --run runs/tiny --judge judge
    """
    eval_stage(*open_to_judge(run, judge))


@app.command()
def ablate(run: RunFolder, judge: JudgeNames = None):
    """Train other curricula and variants of Eq. 2, and compare: Table 2, Fig. 4.

    Example: python pit.py ablate --run runs/tiny
    """
    lm, run, parts, judges = open_to_judge(run, judge)
    import curriculum
    import report
    import reward

    # Eq. 2 as published, and with its first three terms
    for role, loss_of in (("reward_gap2", reward.gap_loss), ("reward_gap3", reward.three_terms)):
        reward.train_gap_reward(lm, run, parts["rm"], parts["held_out"], role, loss_of)
    # Table 2: one adapter per curriculum, its last
    lasts = {}
    for name in curriculum.CURRICULA:
        lasts[name] = train_rounds(lm, run, parts, name, prefix=report.ablated(name))
    eval_stage(lm, run, parts, judges, lasts)


@app.command(name="judge")
def judge_command(
    run: RunFolder,
    by: option(str, "me, or a server's address, such as http://localhost:8000/v1."),
    llm: option(str, "The model's name there; its key: JUDGE_API_KEY in the environment.") = None,
    n: option(int, "Held-out prompts to ask about.", min=1) = 128,
):
    """Let a person, or a language model, compare a run's answers, blind.

    Example: python pit.py judge --run runs/tiny --by me
    """
    is_person = by == "me" and not llm
    is_server = by.startswith("http") and llm
    if not (is_person or is_server):
        raise UserError(
            "Who judges? Give --by me alone, or a server's address and the name of a model there:\n"
            "--by http://localhost:8000/v1 --llm NAME"
        )
    import evaluate
    import report
    import votes
    from judges import default_judges

    # 1. the run, and the judges that it has
    opened = open_run(run)
    opened.lock()  # `eval` writes its results, too
    known = opened.results().get("judges", {})
    if llm in (*known, *default_judges(opened.config), votes.ME):
        raise UserError(
            f"--llm {llm}: a judge of this run has that name. Let the server use another."
        )
    first = votes.read_answers(opened)[0]
    if any(judge not in known for judge in first["scores"]):
        raise UserError(f"An evaluation was cut short. First run: {opened.command('eval')}")
    # 2. their votes
    if is_person:
        votes.ask_person(opened, n)
    else:
        votes.ask_llm(opened, by, llm, n)
    # 3. the tables with these votes
    evaluate.add_votes(opened)
    report.write_report(opened, voter=llm or votes.ME)


@app.command(name="runs")
def runs_command(
    folder: Annotated[Path, typer.Argument(help="Where to look.", file_okay=False)] = Path("runs"),
):
    """List all runs: model, data, seed, the last stage, and delta of PIT over the original.

    Example: python pit.py runs
    """
    from rich.console import Console
    from rich.table import Column, Table

    from run import Run

    columns = "run", "model", "data", "seed", "stage", "delta (judge)"
    table = Table(*[Column(name, overflow="fold") for name in columns])
    for file in sorted([*folder.glob("metrics.jsonl"), *folder.glob("*/metrics.jsonl")]):
        try:
            summary = Run(file.parent).summary()
        except (UserError, KeyError, TypeError):  # damaged, or edited by hand
            summary = ["", "", "", "damaged"]
        table.add_row(str(file.parent), *summary)
    if not table.rows:
        raise UserError(f"There are no runs in {folder}. Start one with: python pit.py all")
    Console(markup=False).print(table)


# ---- using a run -------------------------------------------------------------------------------


@app.command(name="infer")
def infer_command(
    run: RunFolder,
    prompt: Annotated[str, typer.Argument(help="What to answer (omit for a conversation).")] = None,
    response: option(str, "Improve this text; - reads it from a pipe, or from < FILE.") = None,
    input: option(Path, "Rows with `prompt`, optionally `response`.", exists=True) = None,
    output: option(Path, "Where the rows of --input go, as .jsonl.") = None,
    rounds: option(int, "At most this many improvements.", min=1) = 3,
    temperature: option(float, "For sampling. 0: the likeliest token.", min=0, max=2) = 0.4,
    seed: option(int, "Seed for sampling.", min=0) = 0,
    stop: option(StopRule, "Stop at no gain, at no change, or after --rounds.") = "gap",
):
    """Answer a prompt, and improve the answer round by round.

    Example: python pit.py infer --run runs/tiny --input prompts.jsonl --output improved.jsonl
    """
    check_request(prompt, response, input, output)
    opened = open_run(run)
    cfg = opened.config

    import chat
    import infer
    from files import read_rows, read_turns

    # what is asked, before the base takes its time
    settings = infer.Settings(
        pit=improver(cfg),
        rounds=rounds,
        temperature=temperature,
        stop=stop,
        seed=seed,
    )
    rows = read_rows(input) if input else []
    if response == "-":
        response = sys.stdin.read()
    response = response and response.strip()
    if response == "":
        raise UserError("--response -: nothing came through the pipe.")

    # in training order: an error names the command that trains the first one that is missing
    lm = load_base(opened, ["reward_gap", infer.POLICY, settings.pit])
    if output:
        chat.improve_file(lm, cfg, settings, rows, output)
    elif prompt:
        chat.answer(lm, cfg, settings, read_turns(prompt, "prompt"), response)
    else:
        chat.converse(lm, cfg, settings)


def check_request(prompt, response, input, output):
    """Complain about options of the command `infer` that do not go together."""
    if bool(input) != bool(output):
        raise UserError("--input and --output go together: give both.")
    if input and prompt:
        raise UserError("Give a prompt, or --input and --output, not both.")
    if response and not prompt:
        raise UserError("--response needs its prompt: give the prompt too.")
    if output and output.exists() and not output.is_file():
        raise UserError(f"--output {output} is not a regular file: give a file name.")
    if output and output.suffix != ".jsonl":
        raise UserError(f"--output {output}: rows are written as JSON lines; name it FILE.jsonl.")


@app.command(name="export")
def export_command(
    run: RunFolder,
    adapter: option(str, "Which role, such as pit_rl1 or policy_rl."),
    to: option(Path, "A new folder."),
    merge: option(bool, "A whole transformers model, which does not need peft.") = False,
):
    """Write a role for other programs, as a PEFT adapter or a whole model.

    Example: python pit.py export --run runs/tiny --adapter pit_rl1 --to improver --merge
    """
    from run import new_folder

    opened = open_run(run)
    if adapter not in opened.roles():
        found = ", ".join(opened.roles()) or "none yet"
        raise UserError(f"--adapter {adapter}: the run has {found}.")
    if to.exists():
        raise UserError(f"--to {to} already exists. Give a new folder.")
    if merge and (opened.adapter(adapter) / "head.safetensors").exists():
        raise UserError(f"{adapter} is a reward model, which does not write: leave out --merge.")

    from models import export

    # a merge into 4-bit weights would round them again; an adapter alone merges nothing
    lm = load_base(opened, [adapter], bits=16 if merge else None)
    with new_folder(to) as folder:
        export(lm, adapter, folder, merge)
        (folder / "README.md").write_text(card(lm, opened, adapter, merge), encoding="utf-8")
    print(f"{to}: {adapter} of {run}")


def card(lm, run, role, merge):
    """The model card of an export, card.md.jinja filled in: how to prompt it, what it is worth."""
    from data import improve_prompt
    from models import find_model
    from report import TEMPLATES, label

    base = find_model(run.config.model)
    turns = [{"role": "user", "content": "THE QUESTION"}]
    if not role.startswith(("policy", "reward_policy", "judge")):
        turns = improve_prompt(turns, "THE ANSWER TO IMPROVE")
    page = TEMPLATES.get_template("card.md.jinja")
    return page.render(
        lm=lm,
        run=run,
        role=role,
        merge=merge,
        turns=turns,
        base=base,
        is_local=Path(base).exists(),
        licence=licence_of(base),
        gain=run.gain() if role == improver(run.config) else None,
        label=label,
    )


def licence_of(base):
    """The licence that the card of a base gives, in its folder or on the hub."""
    from huggingface_hub import ModelCard

    try:
        folder = Path(base)
        card = ModelCard.load(folder / "README.md" if folder.exists() else base)
        return card.data.license or "unknown"
    except Exception:  # no card, no network, a broken header
        return "unknown"


# ---- the program -------------------------------------------------------------------------------


def check_words(words):
    """Complain about empty words, which unset variables leave, and about broken UTF-8."""
    for before, word in pairwise(words):
        if re.fullmatch(r"(--[\w-]+=)?\s*", word):
            raise UserError(f"{before} {word!r}: there is no value. Is a shell variable unset?")
        if re.search("[\ud800-\udfff]", word):
            raise UserError(
                f"{word!a} is not valid UTF-8. Rename it; in a C locale, set PYTHONUTF8=1."
            )


def main():
    if os.name == "nt":
        import pyarrow  # noqa: F401  on Windows, loading torch before it can crash the program
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C without a traceback, until Run.lock
    sys.stdin = sys.stdin or open(os.devnull)  # it may be closed: <&-
    for stream in (sys.stdin, sys.stdout):
        if stream:  # it may be closed: >&-
            stream.reconfigure(errors="backslashreplace")  # not all consoles can print all letters
    try:
        check_words(sys.argv)
        return app()
    except Exception as error:
        text = explain(error)
        if text is None:
            raise
    print(f"Error: {text}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
