"""Errors that the user can fix, and the exit codes of every command line of the project."""

import enum


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
    """What ``error`` says, without what a library adds below; its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class SGTError(Exception):
    """A failure with one clear message: the cause, with the user's values, and the fix."""

    exit_code = ExitCode.CRASH


class ConfigError(SGTError, ValueError):
    """A configuration that cannot run."""

    exit_code = ExitCode.CONFIG


class DataError(SGTError):
    """A data set, corpus or tokenizer that is missing, damaged or unfit for the model."""

    exit_code = ExitCode.DATA


class CheckpointError(SGTError):
    """A checkpoint that is missing, damaged or belongs to another model."""

    exit_code = ExitCode.CHECKPOINT


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that cannot be what was saved. Where the run looks by itself, an older one takes its place."""
