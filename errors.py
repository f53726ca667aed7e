"""Error messages: in a line or two, what went wrong, where, and what to do."""

import os
import shlex
import subprocess
import sys
from contextlib import contextmanager

OUT_OF_MEMORY = """In training, repeat `all`, without --overwrite, with half the --micro-batch:
results change only by rounding, and finished work is kept. If it is already 1, or texts were being
written, start a new --run with a lower --rl-batch, --max-prompt or --max-response."""

FULL = ("No space left on device", "Disk quota exceeded")


class UserError(Exception):
    """An error that the user can fix. pit.py prints its text without a traceback; exit code 2."""


def first_line(error):
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def typed():
    """The command that the user typed."""
    return command_line(["python", *sys.argv])


def command_line(words):
    """A command as this system's shell reads it."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def to_continue():
    """How to go on after a stop: the same command, without --overwrite."""
    return f"To continue: {typed().replace(' --overwrite', '')}"


def out_of_memory(error):
    # each device and each system words it differently
    texts = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


@contextmanager
def explained(what, advice):
    """Turn whatever goes wrong into a UserError: what failed, why, and what to do."""
    try:
        yield
    except Exception as error:  # libraries raise errors of all kinds
        if out_of_memory(error):
            raise
        raise UserError(f"{what}: {first_line(error)}\n{advice}") from None


def explain(error):
    """What to tell the user; None for a bug, whose traceback should be shown."""
    if isinstance(error, UserError):
        return str(error)
    said = first_line(error)
    if any(words in said for words in FULL):
        return f"{said}. Nothing is lost. Free some space. {to_continue()}"
    if isinstance(error, OSError) or "(os error" in said:  # as Rust libraries put it
        return f"{said}."
    if out_of_memory(error):
        return f"Out of memory: {said[:100]}\n{OUT_OF_MEMORY}"
    return None
