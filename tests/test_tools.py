"""tools/: what the pages tell people to run still runs."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from errors import UserError
from tools import bench, compare, mutants

PAGES = Path(__file__).parent.parent / "docs"


def test_speed_times_every_phase_of_a_ppo_iteration():
    cfg = SimpleNamespace(
        max_response=4,
        temperature=1.0,
        micro_batch=4,
        minibatch=2,
        epochs=1,
        rl_lr=1e-5,
        critic_lr=1e-3,
        kl=0.05,
    )
    found = bench.measure("tiny", "synthetic", 16, 4, 48, 1, cfg)
    assert list(found) == list(bench.COLUMNS)
    assert found["total"] == pytest.approx(sum(found[phase] for phase in bench.PHASES))
    assert found["tokens per second"] == pytest.approx(4 * 4 / found["total"])


def test_stages_times_a_step_of_each(capsys):
    bench.stages("tiny", bits=16, batch=2, steps=1)
    names = re.findall(r"^\| (\w+) \| [\d.]+ \| \d+ \|", capsys.readouterr().out, re.MULTILINE)
    expected = "policy_sft pit_sft reward_policy reward_gap policy_rl pit_rl0 pit_rl1"
    assert names == expected.split()


def test_the_page_has_the_hours_that_the_defaults_take(capsys):
    """Renew its table with `python tools/bench.py hours`."""
    bench.hours()
    said = capsys.readouterr().out
    page = (PAGES / "performance.md").read_text(encoding="utf-8")
    on_page = re.findall(r"^\| `?(\w+)`? \|[^|]*\| (\d+:\d\d) \| (\d+:\d\d) \|", page, re.MULTILINE)
    times = re.findall(r"^  (\w+) .* (\d\d:\d\d|\d+:\d\d:\d\d)$", said, re.MULTILINE)
    columns = {}
    for name, time in times:
        *hours, minutes, _ = time.split(":")
        columns.setdefault(name, []).append(f"{int(*hours or [0])}:{minutes}")
    assert columns == {{"evaluation": "eval"}.get(name, name): list(two) for name, *two in on_page}


def test_compare_names_a_run_that_is_not_there(tmp_path):
    command = [sys.executable, "tools/compare.py", tmp_path / "nope"]
    done = subprocess.run(command, cwd=mutants.ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: There is no run in ") and "Traceback" not in done.stderr


def test_compare_draws_a_stage_of_several_runs(miniature, tmp_path):
    plot = tmp_path / "compare.png"
    compare.main([miniature, miniature], stage="pit_rl0", plot=plot)
    assert plot.stat().st_size > 10_000
    assert [line["step"] for line in compare.lines_of(miniature, "pit_rl0")] == [0, 1]
    for stage in ("pit_r1", "policy_sft"):
        with pytest.raises(UserError, match=f"has no RL stage {stage}"):
            compare.lines_of(miniature, stage)


def test_every_line_of_the_list_of_mutants_is_there():
    """The mistakes themselves are made on demand: python tools/mutants.py"""
    listed = mutants.read_list(mutants.LIST.read_text(encoding="utf-8"))
    assert f"{len(listed)} of them" in mutants.__doc__
    for mutant in listed:
        mutants.mutate(mutant, (mutants.ROOT / mutant.file).read_text(encoding="utf-8"))
        if not mutant.excused:
            file, _, test = mutant.test.partition("::")
            source = (mutants.ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not test or f"def {test.partition('[')[0]}(" in source, test
