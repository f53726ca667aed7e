"""Nothing is lost: a run that was stopped or damaged ends in the numbers of one left alone."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import pytest
import torch

import chat
import curriculum
import data
import models
import pit
import ppo
import reward
import run as run_module
import sft
from errors import UserError
from models import adamw, take_step
from run import Run, differing, shuffled_batch

ROOT = Path(__file__).parent.parent
MINI = dict(
    seed=0,
    model="tiny",
    bits=16,
    lora_r=2,
    lora_alpha=4,
    target_modules=".*q_proj",
    vram=None,
    data="synthetic",
    columns=None,
    pairs=80,
    skip_bad=False,
    max_prompt=48,
    max_response=30,
    sft_steps=2,
    sft_lr=5e-3,
    sft_batch=2,
    rm_steps=2,
    rm_lr=3e-3,
    rm_batch=2,
    rounds="annotated,policy",
    rl_steps=2,
    last_steps=None,
    rl_batch=2,
    rl_lr=1e-3,
    critic_lr=3e-3,
    kl=0.1,
    epochs=1,
    minibatch=2,
    micro_batch=64,
    temperature=1.0,
    eval_n=8,
    save_every=1,
)
ROLES = "policy_sft pit_sft reward_policy reward_gap judge policy_rl pit_rl0 pit_rl1".split()


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the project may catch it."""


@pytest.fixture(autouse=True)
def own_signals(monkeypatch):
    """pytest keeps its own Ctrl-C, and no test waits for the disk."""
    monkeypatch.setattr(run_module.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(run_module.os, "fsync", lambda file: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.signal, "signal", lambda number, handler: None)
        train(folder)
    return folder


def train(folder, stages=(pit.sft_stage, pit.reward_stage, pit.rl_stage), **start):
    """What `all` does, without evaluation, in this process."""
    run = Run.start(folder, MINI, **start)
    shared = pit.prepare(run)
    try:
        run.begin()
        for stage in stages:
            stage(*shared)
    finally:
        run.lock_file.release()


def outcome(folder):
    """All that two runs must have in common: bytes of adapters and metrics, samples, accuracies."""
    files = [*(folder / "adapters").rglob("*.safetensors")]
    files += [folder / "metrics.jsonl", folder / "samples.md"]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    results = json.loads((folder / "results.json").read_text())
    return found | {"reward": results["reward"]}


def check_same(folder, whole):
    mine = outcome(folder)
    other = outcome(whole)
    assert mine.keys() == other.keys()
    assert [name for name in mine if mine[name] != other[name]] == []


# ---- kills -------------------------------------------------------------------------------------


def kill_at_random(monkeypatch, rng):
    """Die at one of the coming moments: around a renaming, or at a line of metrics, cut short."""
    left = rng.randint(1, 25)

    def moment():
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    def replace(old, new, real=os.replace):
        moment()
        real(old, new)
        moment()

    def log(self, real=Run.log, **metrics):
        real(self, **metrics)
        if left == 1:
            path = self.path / "metrics.jsonl"
            path.write_bytes(path.read_bytes()[:-9])
        moment()

    monkeypatch.setattr(run_module.os, "replace", replace)
    monkeypatch.setattr(Run, "log", log)


def test_killed_at_any_moment_a_run_ends_in_the_same_bytes(whole, tmp_path, monkeypatch):
    seed = 0
    print(f"kills of seed {seed}")
    rng = random.Random(seed)
    kills = 0
    stages = set()
    while True:
        with monkeypatch.context() as patch:
            kill_at_random(patch, rng)
            try:
                train(tmp_path / "run")
                break
            except Killed:
                kills += 1
                stages |= {folder.name for folder in (tmp_path / "run").glob("checkpoints/[!.]*")}
    assert kills >= 10 and stages == set(ROLES)
    times = json.loads((tmp_path / "run" / "results.json").read_text())["time_s"]
    assert set(times) == set(ROLES)
    check_same(tmp_path / "run", whole)


def start_all(folder):
    words = [f"--{name.replace('_', '-')}={value}" for name, value in MINI.items() if value]
    return subprocess.Popen(
        [sys.executable, "pit.py", "all", "--run", folder, *words],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def reach(process, stage):
    """Read what a process prints until it announces `stage`; whether it did."""
    return any(f"] {stage}: " in line for line in process.stdout)


def test_sigterm_and_sigkill_in_real_processes(whole, tmp_path):
    folder = tmp_path / "run"
    process = start_all(folder)
    assert reach(process, "pit_sft"), process.stderr.read()
    with pytest.raises(UserError, match="in use by another process"):
        Run(folder).lock()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 143, err
    assert "To continue: python pit.py all --run" in err and "Traceback" not in err
    process = start_all(folder)
    assert reach(process, "policy_rl"), process.stderr.read()
    process.kill()
    process.communicate()
    train(folder)  # though it was killed, its lock is gone
    check_same(folder, whole)


# ---- one parameter, in place of a language model -----------------------------------------------


class Value:
    """Stands for a language model whose adapter is one number or more."""

    def __init__(self, p):
        self.p = p

    def save(self, role, folder):
        (folder / "value").write_text(repr(self.p.tolist()))


TOY = dict(seed=0, model="toy", data="noise", save_every=2)


def toy(folder, stop=None, error=Killed, loss_at=lambda step: 1.0, overwrite=False, **options):
    """A stage of 7 steps, a checkpoint every 2, and `error` in step `stop` -> what it learned."""
    run = Run.start(folder, TOY | options, overwrite)
    run.begin()
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = adamw([p], 0.1)
    numbers = {"sum": 0.0}
    with run.stage("toy", "go where the noise goes"):
        for step in run.steps(7, [optimizer], numbers):
            if step == stop:
                raise error
            loss = ((p - torch.randn(3)) ** 2).sum() * loss_at(step)
            loss.backward()
            take_step(optimizer, 0.1)
            numbers["sum"] += loss.item()
            run.log(loss=loss.item())
        run.keep(Value(p), "toy")
    return p.tolist(), numbers["sum"], run.metrics()


def test_a_full_disk_loses_nothing(tmp_path, monkeypatch):
    expected = toy(tmp_path / "whole")
    full = OSError(errno.ENOSPC, "No space left on device")
    left = 0

    def fsync(file):
        nonlocal left
        left -= 1
        if left <= 0:
            os.ftruncate(file, 3)
            raise full

    for case in range(1, 20, 3):  # the disk is full at the 1st, 4th, ... file
        left = case
        with monkeypatch.context() as patch, pytest.raises(OSError):
            patch.setattr(run_module.os, "fsync", fsync)
            toy(tmp_path / str(case))
        assert toy(tmp_path / str(case)) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_stage_and_spoils_nothing(tmp_path, bad):
    with pytest.raises(UserError, match=r"toy, step 5: loss is (nan|inf)"):
        toy(tmp_path / "run", loss_at=lambda step: bad if step == 5 else 1.0)
    assert toy(tmp_path / "run") == toy(tmp_path / "whole")


def test_the_first_signal_ends_the_step_the_second_ends_all(tmp_path, monkeypatch, capfd):
    ends = []
    monkeypatch.setattr(run_module.os, "_exit", ends.append)

    def interrupt(self, real=Run.log, **metrics):
        real(self, **metrics)
        if self.step == 2:
            self.on_signal(signal.SIGINT, None)
            assert ends == []
            if "twice" in str(self.path):
                self.on_signal(signal.SIGINT, None)
                assert ends == [130]

    for folder in ("once", "twice"):
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
            patch.setattr(Run, "log", interrupt)
            toy(tmp_path / folder)
        assert "after step 3 of 7" in capfd.readouterr().err
    assert toy(tmp_path / "once") == toy(tmp_path / "whole")


# ---- damage ------------------------------------------------------------------------------------


def hurt(file, rng):
    """Damage a file in one of four ways."""
    content = file.read_bytes()
    at = rng.randrange(file.stat().st_size)
    flipped = content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]
    file.write_bytes(rng.choice([content[:at], b"", flipped, rng.randbytes(len(content))]))


@pytest.mark.parametrize("how_many", [1, 2])
def test_damaged_checkpoints_are_named_and_passed_over(tmp_path, capsys, how_many):
    expected = toy(tmp_path / "whole")
    rng = random.Random(how_many)
    with pytest.raises(Killed):
        toy(tmp_path / "stopped", stop=5)
    for case in range(6):
        shutil.copytree(tmp_path / "stopped", tmp_path / str(case))
        steps = sorted((tmp_path / str(case) / "checkpoints" / "toy").iterdir())
        assert [step.name for step in steps] == ["000002", "000004"]
        for step in steps[-how_many:]:
            hurt(rng.choice(list(step.iterdir())), rng)
        capsys.readouterr()
        assert toy(tmp_path / str(case)) == expected
        said = capsys.readouterr().out
        assert said.count("is damaged") == how_many
        assert ("continuing after step 2" in said) == (how_many == 1)


def test_damaged_adapters_are_named_and_trained_again(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    run = Run(tmp_path / "run")
    rng = random.Random(0)
    for role in ("pit_sft", "judge"):
        (run.adapter(role) / ".DS_Store").write_text("left by a file browser, and no damage")
        assert run.done(role)
        for file in [file for file in run.adapter(role).iterdir() if file.name != ".DS_Store"]:
            content = file.read_bytes()
            hurt(file, rng)
            assert not run.done(role) and f"{role} is damaged" in capsys.readouterr().out
            file.write_bytes(content)
    hurt(run.adapter("reward_gap") / "head.safetensors", rng)
    with pytest.raises(UserError, match="reward_gap is missing or damaged.*python pit.py reward"):
        pit.load_base(run, ["reward_gap"])
    train(tmp_path / "run", stages=(pit.sft_stage, pit.reward_stage))
    mine = outcome(tmp_path / "run")
    other = outcome(whole)
    for found in (mine, other):  # lines are in another order
        found["metrics.jsonl"] = sorted(found["metrics.jsonl"].split(b"\n"))
    assert mine == other


def test_an_adapter_under_another_name_or_of_another_shape_is_refused(whole, lm, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    run = Run(tmp_path / "run")
    shutil.rmtree(run.adapter("pit_rl1"))
    shutil.copytree(run.adapter("reward_gap"), run.adapter("pit_rl1"))
    assert not run.done("pit_rl1") and "another role's" in capsys.readouterr().out

    # this base's adapters have another rank and more layers than the run's
    for role in ("pit_sft", "reward_gap"):
        assert run.done(role)
        with pytest.raises(UserError, match=f"{role} does not fit"):
            run.load(lm, role)
    run.config.target_modules = ".*v_proj"
    with pytest.raises(
        UserError, match="does not fit tiny, rank 2: its weights belong to other layers"
    ):
        pit.load_base(run, ["pit_sft"])
    run.config.target_modules = MINI["target_modules"]
    own = pit.load_base(run)
    run.load(own, "reward_gap")
    (run.adapter("pit_rl0") / "adapter_model.safetensors").unlink()
    (run.adapter("policy_rl") / "adapter_model.safetensors").write_text("rubbish")
    for role in ("pit_rl0", "policy_rl"):
        with pytest.raises(UserError, match=f"{role} does not fit"):
            run.load(own, role)


def test_damaged_text_files_get_one_error_that_names_them(tmp_path):
    toy(tmp_path)
    run = Run(tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines) + '{"stage": "toy", "st')  # cut off by a kill: no damage
    assert len(run.metrics()) == len(lines) == 7
    for damaged in ('{"stage": "toy", "st', "\xff", '{"stage": "t\xffy", "step": 1}', ""):
        metrics.write_text("".join([*lines[:2], damaged + "\n", *lines[2:]]), encoding="latin-1")
        with pytest.raises(UserError, match="metrics.jsonl is damaged in line 3"):
            run.metrics()
    (tmp_path / "results.json").write_text('{"time_s"')
    with pytest.raises(UserError, match="results.json is damaged.*\nDelete it"):
        run.results()
    config = json.loads((tmp_path / "config.json").read_text())
    no_checksum = {name: value for name, value in config.items() if name != "checksum"}
    no_model = {name: value for name, value in config.items() if name != "model"}
    edits = config | {"seed": 1}, no_checksum | {"seed": "0"}, config | {"data": 1}, no_model
    for edited in edits:
        (tmp_path / "config.json").write_text(json.dumps(edited))
        with pytest.raises(UserError, match="config.json was edited"):
            Run(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"data": "moved.jsonl"}))
    assert Run(tmp_path).config.data == "moved.jsonl"
    (tmp_path / "config.json").write_text("[")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="config.json is damaged"):
            Run.start(tmp_path, TOY, overwrite)
    assert (tmp_path / "adapters" / "toy" / "value").exists()


# ---- other options, other runs -----------------------------------------------------------------


def test_a_run_continues_with_its_own_options_only(tmp_path):
    toy(tmp_path)
    with pytest.raises(UserError, match=r"seed=0 \(now 1\)(.|\n)*--run(.|\n)*--overwrite"):
        toy(tmp_path, seed=1)
    run = Run.start(tmp_path, TOY | dict(save_every=5))  # may change: no result depends on it
    run.pin_data("abc")
    run.begin()
    assert run.config.versions.keys() >= {"python", "torch"}
    run.lock()
    with pytest.raises(UserError, match="in use"):
        Run.start(tmp_path, TOY, overwrite=True).lock()
    run.lock_file.release()
    config = json.loads((tmp_path / "config.json").read_text())
    config["versions"] = {"python": "1.5"}  # other versions are no reason to refuse
    (tmp_path / "config.json").write_text(json.dumps(config))
    run = Run.start(tmp_path, TOY)
    run.config.data = "x.jsonl"
    with pytest.raises(UserError, match="x.jsonl no longer holds the data.*\nPut back"):
        run.pin_data("abd")


def test_options_are_checked_again_under_the_lock(tmp_path):
    """Two commands start on one new folder; the second one waits for the first to end."""
    late = Run.start(tmp_path / "run", TOY | dict(seed=1))
    toy(tmp_path / "run")
    with pytest.raises(UserError, match="begun by another process meanwhile"):
        late.begin()


def test_an_overwritten_run_stays_until_there_is_a_new_adapter(tmp_path):
    folder = tmp_path / "run"
    aside = tmp_path / "run" / ".replaced"
    expected = toy(folder)
    (folder / "mine.txt").write_text("not of the run")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    # model or data turn out to be bad: the new run never begins
    Run.start(folder, TOY | dict(seed=1), overwrite=True)
    assert {file: file.read_bytes() for file in before} == before
    for seed in (1, 2):  # the second one replaces one that never had an adapter
        with pytest.raises(Killed):
            toy(folder, stop=5, seed=seed, overwrite=True)
        assert (aside / "adapters" / "toy" / "value").exists()
        assert json.loads((aside / "config.json").read_text())["seed"] == 0
        assert not (folder / "adapters").exists()
    assert toy(folder, seed=2) != expected
    assert not aside.exists() and (folder / "mine.txt").exists()


def test_an_overwrite_that_a_kill_cut_short_leaves_nothing_of_the_old_run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    toy(folder)
    (folder / "samples.md").write_text("of the old run")
    replace = os.replace
    moved = []

    def third_is_cut_short(source, target):
        moved.append(source)
        if len(moved) == 3:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(run_module.os, "replace", third_is_cut_short)
        toy(folder, seed=1, overwrite=True)
    assert toy(folder, seed=1) == toy(tmp_path / "whole", seed=1)
    assert not (folder / "samples.md").exists()
    stages = [json.loads(line)["stage"] for line in open(folder / "metrics.jsonl")]
    assert len(stages) == len(open(tmp_path / "whole" / "metrics.jsonl").readlines())


def test_a_run_that_has_learned_nothing_yet_may_have_other_options(tmp_path):
    expected = toy(tmp_path / "whole", seed=1)
    with pytest.raises(Killed):
        toy(tmp_path / "run", stop=1)
    assert toy(tmp_path / "run", seed=1) == expected


@pytest.mark.parametrize("name", ["checkpoints", "results.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_other_programs_files_are_never_touched(tmp_path, name, overwrite):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"not a run, but holds {name}"):
        Run.start(tmp_path, MINI, overwrite)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 8}')
    (tmp_path / name).rmdir()
    with pytest.raises(UserError, match="not a run, but holds config.json"):
        Run.start(tmp_path, MINI, overwrite)
    assert (tmp_path / "config.json").exists()


def test_a_run_takes_over_what_its_options_would_give(whole, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(whole, source)
    for role in ("policy_rl", "pit_rl0", "pit_rl1"):
        shutil.rmtree(source / "adapters" / role)
    train(tmp_path / "run", source=source)
    said = capsys.readouterr().out
    assert "judge is taken over" in said and "\npolicy_sft: " not in said
    check_same(tmp_path / "run", whole)
    # what was taken over took this run no time
    times = json.loads((tmp_path / "run" / "results.json").read_text())["time_s"]
    assert set(times) == {"policy_rl", "pit_rl0", "pit_rl1"}
    # the same command again, after it was cut short while it took over: it goes on there
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    for role in ("policy_rl", "judge", "pit_sft"):
        shutil.rmtree(tmp_path / "cut" / "adapters" / role)
    Run.start(tmp_path / "cut", MINI, source=source).begin()
    said = capsys.readouterr().out
    assert said.count("is taken over") == 2 and not Run(tmp_path / "cut").done("policy_rl")
    times_seen = Counter((row["stage"], row["step"]) for row in Run(tmp_path / "cut").metrics())
    assert set(times_seen.values()) == {1}
    with pytest.raises(UserError, match="its own adapters"):
        Run.start(tmp_path / "run", MINI, source=tmp_path / "run")
    options = vars(Run(whole).config)
    for change, retrained in {
        "kl": ["policy_rl", "pit_rl0", "pit_rl1"],
        "rounds": ["pit_rl0", "pit_rl1"],
        "last_steps": ["pit_rl1"],
        "rm_lr": ["reward_policy", "reward_gap", "judge", "policy_rl", "pit_rl0", "pit_rl1"],
        "sft_lr": ["policy_sft", "pit_sft", "policy_rl", "pit_rl0", "pit_rl1"],
        "eval_n": [],
        "micro_batch": [],
        "data fingerprint": ROLES,
    }.items():
        new = options | {change: "another"}
        assert [role for role in ROLES if differing(options, new, role)] == retrained


def test_a_run_that_takes_over_lets_go_of_the_one_that_it_replaces(whole, tmp_path):
    """Or the next --overwrite would keep that one, and delete this one."""
    shutil.copytree(whole, tmp_path / "run")
    options = dict(vars(Run(whole).config))
    run = Run.start(tmp_path / "run", options, overwrite=True, source=whole)
    run.begin()
    assert run.done("judge") and not (tmp_path / "run" / ".replaced").exists()


def test_a_config_that_an_editor_saved_with_a_bom_is_read(tmp_path):
    toy(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("\ufeff" + file.read_text(encoding="utf-8"), encoding="utf-8")
    assert Run(tmp_path).config.seed == TOY["seed"]


def test_a_run_whose_data_is_bad_leaves_no_folder(tmp_path):
    run = Run.start(tmp_path / "new", MINI | {"data": str(tmp_path / "nowhere.jsonl")})
    with pytest.raises(UserError, match="no such file"):
        pit.prepare(run)
    assert not (tmp_path / "new").exists()


def test_runs_are_listed_with_what_they_have_reached(whole):
    assert Run(whole).summary() == ("tiny", "synthetic", "0", "pit_rl1 (smoke)", "")


def test_a_stage_that_is_done_again_is_the_last_one(tmp_path):
    run = Run.start(tmp_path / "run", {"seed": 0})
    (tmp_path / "run").mkdir()
    run.started = 0
    for run.name in ("eval", "pit_rl1", "eval"):
        run.add_seconds()
    assert list(run.results()["time_s"]) == ["pit_rl1", "eval"]


def test_a_run_with_odd_results_is_listed_as_damaged(tmp_path, capsys):
    toy(tmp_path / "odd")
    for results in ('{"time_s": 5}', '{"table1": [{}]}'):
        (tmp_path / "odd" / "results.json").write_text(results)
        pit.runs_command(tmp_path)
        assert "damaged" in capsys.readouterr().out


def test_every_draw_depends_on_the_seed(tmp_path, monkeypatch):
    """Or runs of several seeds would share their order, their samples, or their first weights."""
    seeds = set()

    def spy(module, name, seed_of):
        real = getattr(module, name)

        def spied(*args, **kwargs):
            seeds.add((module.__name__, name, seed_of(args, kwargs)))
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, spied)

    for module in (sft, reward, curriculum):
        spy(module, "shuffled_batch", lambda args, _: args[3])
    for module in (run_module, ppo, chat):
        spy(module, "seed_all", lambda args, _: args[0])
    spy(data, "load_pairs", lambda args, _: args[2])
    spy(data, "split", lambda args, _: args[2])
    spy(models, "load_model", lambda _, kwargs: kwargs["seed"])
    monkeypatch.setitem(MINI, "seed", 5)
    train(tmp_path / "run")
    assert len(seeds) == 9 and {seed for *_, seed in seeds} == {5}, seeds


def test_a_run_does_not_go_on_with_other_pairs(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path / "run")
    monkeypatch.setattr(data, "load_pairs", lambda *_: data.synthetic_pairs(80, seed=9))
    with pytest.raises(UserError, match="no longer holds"):
        pit.prepare(Run(tmp_path / "run"))


def test_held_out_prompts_come_once(whole, monkeypatch):
    pairs = data.synthetic_pairs(80, seed=0)
    twice = pairs + [data.Pair(pair.prompt, pair.chosen, "another") for pair in pairs]
    monkeypatch.setattr(data, "load_pairs", lambda *_: twice)
    monkeypatch.setattr(Run, "pin_data", lambda *_: None)
    monkeypatch.setattr(Run, "lock", lambda self: None)
    _, _, parts = pit.prepare(Run(whole))
    prompts = [pair.prompt for pair in parts["held_out"]]
    assert len(prompts) == 8 and all(prompts.count(prompt) == 1 for prompt in prompts)
    assert len(parts["sft"]) == 40


def test_commands_in_messages_can_be_copied(tmp_path):
    run = Run.start(tmp_path / "my run", MINI)
    said = f"First run: python pit.py reward --run '{tmp_path}/my run'"
    with pytest.raises(UserError, match=re.escape(said)):
        run.check(["judge"])


def test_missing_given_answers_are_told_before_training(tmp_path):
    run = Run.start(tmp_path / "run", MINI | dict(rounds="given"))
    with pytest.raises(UserError, match="needs a column `response`"):
        pit.prepare(run)


def test_a_continued_stage_remembers_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.time, "perf_counter", count(0.0, 10.0).__next__)
    toy(tmp_path / "whole")
    with pytest.raises(Killed):
        toy(tmp_path / "run", stop=5)
    toy(tmp_path / "run")
    whole, run = (Run(tmp_path / name).results()["time_s"] for name in ("whole", "run"))
    assert run == whole


# ---- order -------------------------------------------------------------------------------------


def test_batches_visit_everything_once_a_pass_in_an_order_of_its_own():
    visited = [row for step in range(10) for row in shuffled_batch(range(10), 3, step, seed=3)]
    passes = visited[:10], visited[10:20], visited[20:]
    assert all(sorted(rows) == list(range(10)) for rows in passes)
    assert len(set(map(tuple, passes))) == 3
    assert shuffled_batch(range(10), 30, 0, seed=3) == visited  # whatever the size of a batch
    assert shuffled_batch(range(10), 30, 0, seed=4) != visited
