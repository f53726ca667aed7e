"""examples/grpo_trl.py, on a run in miniature. TRL is optional: without it, names are checked."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "grpo_trl.py"
MINI = (
    "--pairs 80 --sft-steps 1 --sft-batch 4 --rm-steps 1 --rm-batch 4 --rl-steps 1 --rl-batch 8 "
    "--minibatch 8 --eval-n 8 --until rl"
)


def test_what_it_imports_from_this_repository_exists():
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
            for alias in node.names:
                assert hasattr(import_module(node.module), alias.name), alias.name


def test_its_calls_into_this_repository_have_the_right_arguments():
    tree = ast.parse(EXAMPLE.read_text(encoding="utf-8"))
    ours = {"pit": import_module("pit")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").exists():
            for alias in node.names:
                ours[alias.name] = getattr(import_module(node.module), alias.name)
    checked = []
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        function = ours.get(name) or getattr(ours["pit"], name.removeprefix("pit."), None)
        if function:
            keywords = {keyword.arg: None for keyword in call.keywords}
            inspect.signature(function).bind(*call.args, **keywords)
            checked.append(name)
    assert {"pit.load_base", "judges_by_name", "load_parts", "export", "gaps"} <= set(checked)


@pytest.mark.skipif(find_spec("trl") is None, reason="needs trl")
def test_it_trains_and_judges(tmp_path):
    run = tmp_path / "mini"
    for command in (["pit.py", "all", *MINI.split(), "--run", run], [EXAMPLE, run]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert "grpo {'n': 8," in done.stdout
    assert (tmp_path / "mini-grpo" / "adapter_model.safetensors").exists()
