"""Errors that the user can fix, and the exit codes of every command line of the project."""

import enum
import errno


class ExitCode(enum.IntEnum):
    """Exit codes. Scripts and schedulers rely on them; ``meaning`` is the text for people."""

    DONE = 0, "done"
    CRASH = 1, "crash or divergence"
    CONFIG = 2, "configuration or usage"
    DATA = 3, "data or tokenizer"
    CHECKPOINT = 4, "checkpoint"
    # EX_TEMPFAIL of sysexits.h: "the user is invited to retry".
    SAVED = 75, "stopped as asked and saved: start again to go on"
    FORCED = 76, "stopped as asked without saving: start again to go on from the newest checkpoint"
    INTERRUPTED = 130, "interrupted before training began"
    BROKEN_PIPE = 141, "the reader of the output went away"

    meaning: str

    def __new__(cls, value: int, meaning: str) -> "ExitCode":
        """An integer with its meaning."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member


def first_line(error: BaseException) -> str:
    """What ``error`` says, without what a library adds below; its type where it says nothing.

    A line that ends with a colon goes on in the next one.
    """
    first, *more = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Disk full, quota used up, file too large for the file system."""


class SGTError(Exception):
    """A failure with one clear message: the cause, with the user's values, and the fix."""

    exit_code = ExitCode.CRASH


class ConfigError(SGTError, ValueError):
    """A configuration that cannot run."""

    exit_code = ExitCode.CONFIG


class DataError(SGTError):
    """A data set, corpus or tokenizer that is missing, damaged or unfit for the model."""

    exit_code = ExitCode.DATA


class LeaseError(SGTError):
    """Another process writes into the same folder, or has taken it over."""

    exit_code = ExitCode.CHECKPOINT


class LeaseLostError(LeaseError):
    """Another process has taken over the folder that this one was writing into."""


class CheckpointError(SGTError):
    """A checkpoint that is missing, damaged or belongs to another model."""

    exit_code = ExitCode.CHECKPOINT


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that cannot be what was saved. Where the run looks by itself, an older one takes its place."""


def of_full_disk(error: OSError) -> SGTError | None:
    """``error`` for the user, if it says that there is no room; None if it is something else."""
    if error.errno not in FULL:
        return None
    where = error.filename or "the output"
    return SGTError(f"cannot write {where}: {error.strerror}; make room and start again")
