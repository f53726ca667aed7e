"""What people are told when something goes wrong: one or two lines that say what and where, and what to do about it."""

import errno
import math
import shlex
import sys

OUT_OF_MEMORY = """Repeat `all` with half the --micro-batch, which all commands then use: results change by rounding alone, and
what is done is kept. If that is 1 already, start a new --run with a lower --max-prompt, --max-response or --rl-batch."""


class UserError(Exception):
    """Something the user can mend. pit.py prints it as one or two lines, without a traceback, and exits with code 2."""


def first_line(error):
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def same_command():
    """What the user typed, to type again."""
    return shlex.join(["python", *(word for word in sys.argv if word != "--overwrite")])


def finite(cause="The learning rate may be too high, or an input is broken.", **values):
    """Numbers by name, as they are, or FloatingPointError for the first that is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {float(value)}. {cause}")
    return values


def out_of_memory(error):
    texts = (
        "out of memory",
        "not enough memory",
        "can't allocate memory",
    )  # each device and system has its own words
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


def explain(error):
    """What to tell the user about an exception, or None where it is a mistake of ours, whose traceback is worth seeing."""
    said = first_line(error)
    from_system = (
        isinstance(error, OSError) or "os error" in said
    )  # so say libraries in Rust, by exceptions of their own
    if isinstance(error, UserError):
        return str(error)
    if (
        getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        or from_system
        and "os error 28" in said
    ):
        return f"The disk is full. Free some space, then go on with: {same_command()}"
    if from_system:
        return f"{said}. Mend that, then go on with: {same_command()}"
    if out_of_memory(error):
        return f"The memory is full: {said[:100]}\n{OUT_OF_MEMORY}"
    return None
