"""The command line, end to end at miniature size, and what it says to bad input."""

import gc
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import pit as command_line
from run import signal

ROOT = Path(__file__).parent.parent
MINI = "--pairs 120 --sft-steps 2 --sft-batch 4 --rm-steps 2 --rm-batch 4 --rl-steps 2 --rl-batch 8 --minibatch 4 --eval-n 8"


def pit(*words):
    """What `python pit.py WORDS` does, without a process of its own -> (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    out.reconfigure = lambda **how: None
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["pit.py", *map(str, words)])
        patch.setattr(signal, "signal", lambda number, handler: None)
        with pytest.raises(SystemExit) as end:
            command_line.main()
        code = end.value.code or 0
    del end
    gc.collect()  # the lock ends with the run that held it, as with its process
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "mini"
    words = [
        sys.executable,
        "pit.py",
        "all",
        "--run",
        folder,
        *MINI.split(),
    ]  # a real process: the other runs must equal it
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


FIGURES = ["curves.png", "result.png", "fig2.png", "fig3.png", "rounds.png", "stops.png"]
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


def test_every_stage_runs_and_leaves_its_files(mini):
    folder, out = mini
    for role in ROLES:
        assert (folder / "adapters" / role / "adapter_model.safetensors").is_file()
        assert (folder / "adapters" / role / "head.safetensors").is_file() == (
            role.startswith("reward") or role == "judge"
        )
        assert role in out
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        (role, step) for role in ROLES for step in (0, 1)
    ]
    results = json.loads((folder / "results.json").read_text())
    assert {row["judge"] for row in results["table1"]} == {"quality", "judge"}
    assert all(abs(row["win"] + row["lose"] + row["tie"] - 1) < 1e-9 for row in results["table1"])
    assert set(results["time_s"]) == {*ROLES, "eval"}
    assert all((folder / figure).stat().st_size > 10_000 for figure in FIGURES)
    assert all(f"]({figure})" in (folder / "report.md").read_text() for figure in FIGURES)
    assert {line["verdict"] for line in results["scorecard"]} <= {
        "holds",
        "does not hold",
        "cannot tell",
    }
    assert (folder / "report.md").read_text().index("## Scorecard") < (
        folder / "report.md"
    ).read_text().index("## Table 1")
    assert "| quality | pit " in (folder / "report.md").read_text()
    assert (folder / "samples.md").read_text().count("## after") == 5


def test_the_console_fits_100_columns(mini):
    folder, out = mini
    assert (
        "| pit " in out
        and [
            line
            for line in out.replace("\r", "\n").split("\n")
            if len(line) > 100 and str(folder) not in line
        ]
        == []
    )


def test_the_same_seed_gives_the_same_run(mini, tmp_path):
    code, _, err = pit("all", "--run", tmp_path / "mini", *MINI.split())
    assert code == 0, err
    for role in ROLES:
        file = Path("adapters") / role / "adapter_model.safetensors"
        assert (mini[0] / file).read_bytes() == (tmp_path / "mini" / file).read_bytes()
    assert (mini[0] / "metrics.jsonl").read_text() == (
        tmp_path / "mini" / "metrics.jsonl"
    ).read_text()


def test_a_finished_run_is_not_trained_again(mini):
    before = (mini[0] / "metrics.jsonl").read_text()
    for command in ("sft", "reward", "rl"):
        code, out, err = pit(command, "--run", mini[0])
        assert code == 0, err
    assert (mini[0] / "metrics.jsonl").read_text() == before


def test_infer_shows_the_original_and_each_round(mini):
    code, out, err = pit(
        "infer",
        "--run",
        mini[0],
        "Where does each look in the end? Ann north: left back.",
        *"--rounds 2 --stop rounds".split(),
    )
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["original", "round", "round"]
    code, out, err = pit(
        "infer",
        "--run",
        mini[0],
        "Where?",
        "--response",
        "Now Ann west: west",
        *"--rounds 1 --stop rounds".split(),
    )
    assert code == 0 and "Now Ann west: west" in out


def test_a_file_is_improved_and_an_adapter_exported(mini, tmp_path):
    (tmp_path / "in.jsonl").write_text(
        '{"prompt": "Who looks where? Ann north: left."}\n{"prompt": "List.", "response": "tea"}\n'
    )
    words = "--run", mini[0], "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl"
    code, out, err = pit("infer", *words, "--rounds", 1)
    assert code == 0 and "2 rows, 0 of them" in out, err
    assert [
        json.loads(line)["prompt"] for line in (tmp_path / "out.jsonl").read_text().splitlines()
    ][1] == "List."
    code, out, err = pit(
        "export", "--run", mini[0], "--adapter", "pit_rl1", "--to", tmp_path / "whole", "--merge"
    )
    assert code == 0 and (tmp_path / "whole" / "model.safetensors").is_file(), err
    code, out, err = pit(
        "export", "--run", mini[0], "--adapter", "pit_rl1", "--to", tmp_path / "whole"
    )
    assert code == 2 and "there already" in err


@pytest.mark.parametrize(
    "words, said",
    [
        (["infer", "--run", "{mini}"], "either a prompt"),
        (
            ["infer", "--run", "{mini}", "--input", "nowhere.jsonl", "--output", "x.jsonl"],
            "nowhere.jsonl",
        ),
        (
            ["export", "--run", "{mini}", "--adapter", "reward_gap", "--to", "{tmp}/x", "--merge"],
            "leave out --merge",
        ),
        (["export", "--run", "{mini}", "--adapter", "nonesuch", "--to", "{tmp}/x"], "no nonesuch"),
        (
            ["export", "--run", "{mini}", "--adapter", "../adapters/pit_rl1", "--to", "{tmp}/x"],
            "not a path",
        ),
        (["export", "--run", "{mini}", "--adapter", "..", "--to", "{tmp}/x"], "not a path"),
        (["infer", "--run", "{mini}", "  "], "prompt is empty"),
        (["infer", "--run", "{mini}", "half \ud800"], "lone surrogate"),
        (["infer", "--run", "{mini}", "Human: a\n\nAssistant: b"], "turns of user"),
        (["infer", "--run", "{mini}", "Human:"], "turns of user"),
        (["infer", "--run", "{mini}", "Where?", "--response", "north " * 50], "response is longer"),
        (["all", "--run", "{tmp}"], "holds files, but not the settings"),
        (
            ["all", "--run", "{tmp}/new", "--pairs", "100", "--target-modules", "*_proj"],
            "Cannot load the model",
        ),
        (
            [
                "infer",
                "--run",
                "{mini}",
                "--input",
                "{tmp}/in.jsonl",
                "--output",
                "{tmp}/in.jsonl/x.jsonl",
            ],
            "in.jsonl",
        ),
        (["eval", "--run", "{tmp}", "--judge", "no/such-judge"], "no run in"),
        (["infer", "--run", "{mini}", "hello", "--response", ""], "--response is empty"),
        (["infer", "--run", "{mini}", "hello", "--temperature", "-1"], "--temperature"),
        (["infer", "--run", "{mini}", "hello", "--stop", "never"], "--stop never"),
        (["eval", "--run", "{mini}", "--judge", "no/such-judge"], "no/such-judge"),
        (["rl", "--run", "runs/nowhere"], "no run in"),
        (
            ["all", "--run", "{tmp}/new", "--model", "no/such-model", "--data", "synthetic"],
            "no/such-model",
        ),
        (["all", "--run", "{tmp}/new", "--data", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["all", "--run", "{tmp}/new", "--rounds", "annotated,magic"], "magic"),
        (["all", "--run", "{tmp}/new", "--bits", "7"], "--bits 7"),
        (["all", "--run", "{mini}", "--seed", "5"], "other settings"),
    ],
)
def test_bad_input_gets_two_lines_and_exit_code_2(mini, tmp_path, words, said):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}')
    (tmp_path / "config.json").write_text("// notes of mine")
    code, out, err = pit(*(word.format(mini=mini[0], tmp=tmp_path) for word in words))
    assert code == 2, out + err
    assert said in err and "Traceback" not in err
    if err.startswith("Error"):
        assert len(err.splitlines()) <= 3


def test_options_given_beside_smoke_hold(monkeypatch, tmp_path):
    monkeypatch.setattr(command_line, "Session", lambda run: sys.exit(run.config.minibatch))
    assert pit("all", "--smoke", "--run", tmp_path / "a")[0] == 8
    assert pit("all", "--smoke", "--minibatch", 4, "--run", tmp_path / "b")[0] == 4


def test_a_stage_without_its_inputs_names_the_command_to_run(mini, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_text((mini[0] / "config.json").read_text())
    for command, missing in (("rl", "python pit.py sft"), ("eval", "python pit.py sft")):
        code, _, err = pit(command, "--run", folder)
        assert code == 2 and missing in err


def test_a_run_of_an_older_version_gets_one_line(mini, tmp_path):
    config = json.loads((mini[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k not in ("critic_lr", "vram")})
    )
    for words in (
        ["sft"],
        ["rl"],
        ["eval"],
        ["ablate"],
        ["infer", "Hello"],
        ["export", "--adapter", "x", "--to", "y"],
    ):
        code, _, err = pit(*words, "--run", tmp_path)
        assert code == 2 and len(err.splitlines()) == 1 and "critic_lr, vram" in err


def test_every_command_shows_an_example():
    for command in ("all", "sft", "reward", "rl", "eval", "ablate", "infer", "export"):
        code, out, _ = pit(command, "--help")
        assert code == 0 and f"Example: python pit.py {command}" in " ".join(out.split())
