"""Errors that are the user's to mend. Each carries the exit code that the command lines return.

Exit codes: 0 done, 1 crash, 2 configuration or usage, 3 data, 4 checkpoint.
"""


class SGTError(Exception):
    """A failure with one clear message: the cause with the user's values, and the fix."""

    exit_code = 1


class ConfigError(SGTError, ValueError):
    """A configuration that cannot run."""

    exit_code = 2


class DataError(SGTError):
    """A data set, corpus or tokenizer that is missing, damaged or does not fit the model."""

    exit_code = 3


class CheckpointError(SGTError):
    """A checkpoint that is missing, damaged or belongs to another model."""

    exit_code = 4
