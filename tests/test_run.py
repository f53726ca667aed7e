"""Nothing is lost: whenever a run is stopped and whatever is damaged, it ends in the numbers of the run that never was."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

import pit
import ppo
import run as run_module
from errors import UserError
from models import adamw, take_step
from run import Run
from tokens import Tokens

ROOT = Path(__file__).parent.parent
MINI = dict(
    seed=0,
    model="tiny",
    bits=16,
    lora_r=4,
    lora_alpha=8,
    target_modules="all-linear",
    data="synthetic",
    pairs=100,
    skip_bad=False,
    max_prompt=200,
    max_response=30,
    sft_steps=3,
    sft_lr=5e-3,
    sft_batch=4,
    keep_better=0.0,
    unlikelihood=0.0,
    rm_steps=3,
    rm_lr=3e-3,
    rm_batch=4,
    rounds="annotated,policy",
    rl_steps=3,
    rl_batch=4,
    rl_lr=1e-3,
    critic_lr=3e-3,
    kl=0.1,
    target_kl=3.0,
    epochs=1,
    minibatch=2,
    micro_batch=64,
    temperature=1.0,
    eval_n=8,
    save_every=2,
)
ROLES = [
    "policy_sft",
    "pit_sft",
    "reward_policy",
    "reward_gap",
    "judge",
    "policy_rl",
    "pit_rl0",
    "pit_rl1",
]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the project may catch it."""


def train(folder, stages=(pit.sft_stage, pit.reward_stage, pit.rl_stage), options=MINI, **changes):
    """What `all` does, without evaluation, in this process."""
    session = pit.Session(Run.start(folder, options | changes))
    for stage in stages:
        stage(session)


def outcome(folder):
    """All that two runs must have in common: bytes of adapters, heads and metrics, samples, and the measured numbers."""
    folder = Path(folder)
    files = sorted((folder / "adapters").rglob("*.safetensors"))
    weights = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    texts = {name: (folder / name).read_text() for name in ("metrics.jsonl", "samples.md")}
    results = json.loads((folder / "results.json").read_text())
    assert set(results.pop("time_s")) >= {*ROLES}
    return weights | texts | {"reward": results["reward"]}


def check_same(folder, whole):
    mine, other = outcome(folder), outcome(whole)
    assert (
        mine.keys() == other.keys() and [name for name in mine if mine[name] != other[name]] == []
    )
    lines = [json.loads(line) for line in mine["metrics.jsonl"].splitlines()]
    assert len({(line["stage"], line["step"]) for line in lines}) == len(lines)


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


def kill_at_random(monkeypatch, rng):
    """Die at one of the coming moments: before or after anything gets its name, or at a line of metrics, cut short."""
    left = rng.randint(1, 45)

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
    rng, kills, stages = random.Random(0), 0, set()
    while True:
        with monkeypatch.context() as patch:
            kill_at_random(patch, rng)
            try:
                train(tmp_path / "run")
                break
            except Killed:
                kills += 1
                stages |= {
                    file.name
                    for file in (tmp_path / "run").glob("*/*")
                    if not file.name.startswith(".")
                }
    assert kills >= 10 and stages >= {*ROLES}
    check_same(tmp_path / "run", whole)


# ---- real processes --------------------------------------------------------------------------------------------------


def start_all(folder):
    words = [
        f"--{name.replace('_', '-')}={value}" for name, value in MINI.items() if value is not False
    ]
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
    return any(line.startswith(f"{stage}:") for line in process.stdout)


def test_sigterm_and_sigkill_in_real_processes(whole, tmp_path):
    folder = tmp_path / "run"
    process = start_all(folder)
    assert reach(process, "pit_sft")
    with pytest.raises(UserError, match="in use by another process"):
        Run.start(folder, MINI)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "To go on: python pit.py all --run" in err and "Traceback" not in err
    process = start_all(folder)
    assert reach(process, "policy_rl")
    process.kill()
    process.communicate()
    train(folder)  # killed or not, the lock is gone
    check_same(folder, whole)


def announced(log):
    """The stages that a process has begun to train, in order."""
    return [role for role in ROLES if f"\n{role}: " in log.read_text()]


def train_and_tell(folder, log):
    with open(log, "w", buffering=1) as file, redirect_stdout(file):
        train(folder)


@pytest.mark.skipif(
    os.name == "nt", reason="processes that are forked, so as not to wait for imports"
)
def test_sigkill_in_every_stage(whole, tmp_path, monkeypatch):
    """Three kills for each stage that is begun, at random moments within it."""
    folder, log, rng, kills = tmp_path / "run", tmp_path / "log", random.Random(), Counter()
    seconds = json.loads((whole / "results.json").read_text())["time_s"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    for number, stage in enumerate(ROLES, 1):
        while kills.total() < 3 * number and not (folder / "adapters" / stage).exists():
            log.write_text("")
            process = processes.Process(target=train_and_tell, args=(folder, log))
            process.start()
            while process.is_alive() and stage not in announced(log):
                time.sleep(0.01)
            end = time.monotonic() + rng.uniform(
                0, 0.4 * seconds[stage]
            )  # early: the machine may be less busy now
            while time.monotonic() < end and announced(log)[-1:] == [
                stage
            ]:  # no later stage may get through before its turn
                time.sleep(0.01)
            process.kill()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)  # 0: the last stage was through before
            if process.exitcode:
                kills[stage] += 1
    train(folder)
    assert kills.total() >= 20 and kills.keys() == {*ROLES}
    check_same(folder, whole)


# ---- one parameter, in place of a language model -----------------------------------------------------------------------


def toy(folder, stop=None, error=Killed, loss_at=lambda step: 1.0, **options):
    """A stage of 7 steps with checkpoints every 2, which raises `error` in step `stop` -> what it learned."""
    run = Run.start(folder, dict(seed=0, save_every=2) | options)
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer, numbers = adamw([p], 0.1), {"sum": 0.0}
    with (
        run.held,
        run.stage("toy", "go where the noise goes"),
    ):  # closing the file ends the lock, as the process's end does
        for step in run.steps(7, [optimizer], numbers):
            if step == stop:
                raise error
            loss = ((p - torch.randn(3)) ** 2).sum() * loss_at(step)
            loss.backward()
            take_step(optimizer, 0.1)
            numbers["sum"] += loss.item()
            run.log(loss=loss.item())
        with run.new_adapter("toy") as adapter:
            (adapter / "value").write_text(repr(p.tolist()))
    return p.tolist(), numbers["sum"], run.metrics()


def hurt(file, rng):
    """Damage a file in one of four ways."""
    content, at = file.read_bytes(), rng.randrange(file.stat().st_size)
    ways = [
        content[:at],
        b"",
        content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :],
        rng.randbytes(len(content)),
    ]
    file.write_bytes(rng.choice(ways))


@pytest.mark.parametrize("how_many", [1, 2])
def test_damaged_checkpoints_are_named_and_passed_over(tmp_path, capsys, how_many):
    expected, rng = toy(tmp_path / "whole"), random.Random(how_many)
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
        assert said.count("is damaged") == how_many and ("going on after step 2" in said) == (
            how_many == 1
        )


def test_damaged_adapters_are_trained_again(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    run, rng = Run(tmp_path / "run"), random.Random(0)
    for role in ROLES:
        (run.adapter(role) / ".DS_Store").write_text("left by a file browser, and no damage")
        assert run.done(role)
        for file in [file for file in run.adapter(role).iterdir() if file.name != ".DS_Store"]:
            content = file.read_bytes()
            hurt(file, rng)
            assert not run.done(role) and role in capsys.readouterr().out
            file.write_bytes(content)
    hurt(run.adapter("policy_sft") / "adapter_model.safetensors", rng)
    hurt(run.adapter("reward_gap") / "head.safetensors", rng)
    with pytest.raises(UserError, match="python pit.py sft"):
        run.need("policy_sft", "sft")
    train(tmp_path / "run", stages=(pit.sft_stage, pit.reward_stage))
    mine, other = outcome(tmp_path / "run"), outcome(whole)
    assert sorted(mine.pop("metrics.jsonl").split("\n")) == sorted(
        other.pop("metrics.jsonl").split("\n")
    )  # in another order
    assert mine == other


def test_damaged_config_results_and_metrics(whole, tmp_path, capsys):
    for case in range(12):
        folder, rng = tmp_path / str(case), random.Random(case)
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("adapters"))
        for name in ("config.json", "results.json"):
            (folder / name).write_bytes((folder / name).read_bytes()[: rng.randrange(50)])
        with open(folder / "metrics.jsonl", "ab") as file:
            file.write(
                rng.choice([b'{"stage": "pit_rl1", "st', b"\xff\xfe\n", b"null\n7\n", b"{}\n"])
            )
        run = Run(folder)
        assert (
            run.config == Run(whole).config
            and run.results() == Run(whole).results()
            and run.metrics() == Run(whole).metrics()
        )
        said = capsys.readouterr().out
        assert (
            all(f"{name} is damaged" in said for name in ("config.json", "results.json"))
            and "metrics.jsonl, line" in said
        )
        (folder / ".config.json.copy").write_text("[")
        with pytest.raises(UserError, match="There is no run"):
            Run(folder)
        assert ".config.json.copy is damaged" in capsys.readouterr().out
        with pytest.raises(UserError, match="not the settings of a run.*--overwrite"):
            Run.start(folder, MINI)


def test_another_question_is_refused_unless_it_may_overwrite(tmp_path):
    folder = tmp_path / "run"
    expected = toy(folder)
    with pytest.raises(UserError, match=r"seed=0 \(now 1\)") as caught:
        toy(folder, seed=1)
    assert "--run" in str(caught.value) and "--overwrite" in str(caught.value)
    del caught  # its traceback holds the lock
    run = Run.start(folder, dict(seed=0, save_every=5))  # may change: no result depends on it
    run.pin("data fingerprint", "abc")
    assert run.config.versions.keys() >= {"python", "torch"}
    config = json.loads((folder / "config.json").read_text()) | {
        "versions": {"python": "1.5"}
    }  # no reason to refuse
    (folder / "config.json").write_text(json.dumps(config))
    del run
    run = Run.start(folder, dict(seed=0, save_every=2))
    with pytest.raises(UserError, match="data fingerprint is not what it was"):
        run.pin("data fingerprint", "abd")
    with pytest.raises(UserError, match="in use"):
        Run.start(folder, dict(seed=0, save_every=2), overwrite=True)
    del run
    for name in ("answers.json", "fig4.png", "report.md"):
        (folder / name).write_text("old")
    (folder / "mine.txt").write_text("not of the run")
    run = Run.start(folder, dict(seed=1, save_every=2), overwrite=True)
    assert {file.name for file in folder.iterdir()} == {
        ".config.json.copy",
        "config.json",
        ".lock",
        "mine.txt",
    }
    assert not run.done("toy") and run.metrics() == [] and run.config.seed == 1
    del run
    assert toy(folder, seed=1) != expected
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 8}')
    for overwrite in (False, True):
        with pytest.raises(UserError, match="something else than a run"):
            Run.start(tmp_path / "model", MINI, overwrite)


def test_a_full_disk_loses_nothing_and_says_one_line(tmp_path, monkeypatch, capsys):
    expected = toy(tmp_path / "whole")
    for case in range(1, 29, 3):
        left = case

        def fsync(file):
            nonlocal left
            left -= 1
            if left <= 0:
                os.ftruncate(file, 3)
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(run_module.os, "fsync", fsync)
            with pytest.raises(OSError):
                toy(tmp_path / str(case))
        assert toy(tmp_path / str(case)) == expected

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pit, "app", full)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        pit.main()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_stage_and_spoils_nothing(tmp_path, bad):
    with pytest.raises(UserError, match=r"toy, step 5: grad_norm is (nan|inf)"):
        toy(tmp_path / "run", loss_at=lambda step: bad if step == 5 else 1.0)
    assert toy(tmp_path / "run") == toy(tmp_path / "whole")


def test_the_first_signal_ends_the_step_the_second_ends_all(tmp_path, monkeypatch, capsys):
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
        assert "after step 3 of 7" in capsys.readouterr().err
    assert toy(tmp_path / "once") == toy(tmp_path / "whole")


def test_what_goes_wrong_in_ppo_is_said_once(tmp_path, capsys):
    run = Run.start(tmp_path / "run", dict(seed=0))
    mask = torch.ones(2, 3, dtype=torch.long)
    tokens = Tokens(torch.full((2, 5), 7), torch.ones(2, 5), mask)
    logprobs, states, values = torch.zeros(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3)
    sick = ppo.Rollout(tokens, logprobs, torch.full((2, 3), -5.0), states, values, torch.zeros(2))
    with run.stage("sick", ""):
        ppo.check(run, sick, eos=1)
        ppo.check(run, sick, eos=1)
        said = capsys.readouterr().out
        assert all(
            said.count(words) == 1 for words in ("the KL is above", "was cut off", "are the same")
        )
        tokens.ids[0, -1], tokens.ids[1, -2] = 1, 8
        sick.ref_logprobs = sick.logprobs + 0.1
        run.warned.clear()
        ppo.check(run, sick, eos=1)
        assert "Warning" not in capsys.readouterr().out
    sick.scores[1] = float("nan")
    with pytest.raises(UserError, match="score is nan"), run.stage("sick", ""):
        ppo.check(run, sick, eos=1)
