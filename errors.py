"""What people are told when something goes wrong: in a line or two, what, where, and what to do."""

import errno
import math
import shlex
import sys

OUT_OF_MEMORY = """Repeat `all` with half the --micro-batch: results change by rounding alone, and
finished work is kept. If it is 1 already, start a new --run with a lower --max-prompt,
--max-response or --rl-batch."""


class UserError(Exception):
    """An error that the user can fix. pit.py prints its text without a traceback; exit code 2."""


def first_line(error):
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def same_command():
    """What the user typed, to be typed again."""
    return shlex.join(["python", *(word for word in sys.argv if word != "--overwrite")])


def check_finite(numbers):
    """FloatingPointError for the first of these numbers, by name, that is NaN or infinite."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value}. Lower the learning rate of this stage, or look for odd texts "
                "in the data."
            )


def out_of_memory(error):
    # each device and each system has its own words
    texts = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def disk_full(error):
    # libraries in Rust have exceptions of their own, with the system's number in the text
    number = getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT) or "(os error 28)" in first_line(error)


def explain(error):
    """What to tell the user; None for a mistake of ours, whose traceback is worth seeing."""
    said = first_line(error)
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, BrokenPipeError):
        return f"Nobody reads the output any more. To continue: {same_command()}"
    if disk_full(error):
        return f"The disk is full. Free some space, then continue: {same_command()}"
    if isinstance(error, OSError) or "(os error" in said:
        return f"{said}. Once that is fixed, continue: {same_command()}"
    if out_of_memory(error):
        return f"Out of memory: {said[:100]}\n{OUT_OF_MEMORY}"
    return None
