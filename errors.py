"""Error messages: in a line or two, what went wrong, where, and what to do."""

import shlex
import sys
from contextlib import contextmanager

OUT_OF_MEMORY = """In training, repeat `all` with half the --micro-batch: results change by rounding
alone, and finished work is kept. If it is 1 already, or while texts are written, start a new --run
with a lower --rl-batch, --max-prompt or --max-response."""

FULL = ("No space left on device", "Disk quota exceeded")


class UserError(Exception):
    """An error that the user can fix. pit.py prints its text without a traceback; exit code 2."""


def first_line(error):
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def typed():
    """The command that the user typed."""
    return shlex.join(["python", *sys.argv])


def to_continue():
    """How to go on after a stop: the same command, without --overwrite."""
    return f"To continue: {typed().replace(' --overwrite', '')}"


def out_of_memory(error):
    # each device and each system has its own words
    texts = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


@contextmanager
def explained(what, advice):
    """Turn whatever goes wrong into a UserError: what does not work, why, and what to do."""
    try:
        yield
    except Exception as error:  # libraries raise errors of all kinds
        if out_of_memory(error):
            raise
        raise UserError(f"{what}: {first_line(error)}\n{advice}") from None


def explain(error):
    """What to tell the user; None for a mistake of ours, whose traceback is worth seeing."""
    if isinstance(error, UserError):
        return str(error)
    said = first_line(error)
    if any(words in said for words in FULL):
        return f"{said}. Nothing is lost. Make room. {to_continue()}"
    if isinstance(error, OSError) or "(os error" in said:  # as libraries in Rust say it
        return f"{said}."
    if out_of_memory(error):
        return f"Out of memory: {said[:100]}\n{OUT_OF_MEMORY}"
    return None
