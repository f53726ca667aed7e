"""What people are told: an error that they can fix gets a line or two, our mistakes a traceback."""

import errno
from types import SimpleNamespace

import pytest
import torch

from errors import UserError, command_line, explain


@pytest.mark.parametrize(
    "error, said",
    [
        (UserError("do this"), "do this"),
        (OSError(errno.ENOSPC, "No space left on device"), "device. Nothing is lost."),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "To continue: python"),
        # as libraries in Rust say it
        (Exception("No space left on device (os error 28)"), "(os error 28). Nothing is lost."),
        (PermissionError(errno.EACCES, "Permission denied", "/there/x.jsonl"), "/there/x.jsonl"),
        (OSError("Cannot call rmtree on a symbolic link"), "symbolic link"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe."),
        (torch.OutOfMemoryError("CUDA out of memory"), "--micro-batch"),
        (RuntimeError("MPS backend out of memory"), "--micro-batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "--micro-batch"),
        (MemoryError(), "--micro-batch"),
        (RuntimeError("shapes do not match"), None),
        (KeyError("x"), None),
    ],
)
def test_only_our_own_mistakes_keep_their_traceback(error, said):
    text = explain(error)
    if said is None:
        assert text is None
    else:
        assert said in text and len(text.splitlines()) <= 4


def test_a_command_to_repeat_is_quoted_for_the_system_shell(monkeypatch):
    words = ["python", "pit.py", "--run", r"runs\my run"]
    assert command_line(words) == r"python pit.py --run 'runs\my run'"
    monkeypatch.setattr("errors.os", SimpleNamespace(name="nt"))
    assert command_line(words) == r'python pit.py --run "runs\my run"'


def test_a_missing_file_is_not_told_as_a_full_disk():
    error = FileNotFoundError(errno.ENOENT, "No such file or directory", "missing.txt")
    assert explain(error) == "[Errno 2] No such file or directory: 'missing.txt'."
