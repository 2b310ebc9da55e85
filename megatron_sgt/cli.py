"""What all command lines share: exit codes, and arguments that are checked before any work starts."""

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from megatron_sgt import streams
from megatron_sgt.errors import ExitCode, SGTError, of_full_disk
from megatron_sgt.files import unwritable
from megatron_sgt.paths import expand, expand_for_job, expand_in_script

MOST = 2**63 - 1
"""The largest integer of an argument: torch's 64-bit integers and seeds."""


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and leave the process with its exit code.

    0 (or what ``main`` returns): done. An ``SGTError`` is a user's mistake: its message goes to stderr
    without a traceback, and it has its own exit code. 2: usage (from argparse). 130: Ctrl-C. 141: the reader of the
    output went away (``| head``). A full disk, under the output too, is one line and exit code 1. Any other exception
    is a bug: traceback and exit code 1.
    """
    streams.make_readable()
    code: Any
    try:
        code = main() or 0
    except SystemExit as leave:  # of argparse
        code = leave.code or 0
    except SGTError as error:
        _tell(f"error: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        _tell("interrupted")
        code = ExitCode.INTERRUPTED
    except OSError as error:
        code = _lost_output(error)
    try:
        if sys.stdout is not None:  # closed by the shell: >&-
            sys.stdout.flush()
    except OSError as error:
        streams.discard(sys.stdout)
        code = code or _lost_output(error)
    sys.exit(code)


def _lost_output(error: OSError) -> ExitCode:
    """The exit code of a command whose output, or file, has met ``error``; a full disk is told.

    Raises:
        OSError: it is something else.
    """
    if isinstance(error, BrokenPipeError):
        return ExitCode.BROKEN_PIPE
    told = of_full_disk(error)
    if told is None:
        raise error
    _tell(f"error: {told}")
    return ExitCode.CRASH


def _tell(text: str) -> None:
    with contextlib.suppress(OSError):  # stderr may be a full file, too; the exit code is left
        print(text, file=sys.stderr, flush=True)


def warn(lines: Iterable[str]) -> None:
    """Say each of ``lines`` on stderr, as a warning."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr)


def positive(text: str) -> int:
    """Type of an argparse argument: an integer above 0."""
    return _integer(text, 1, "an integer above 0")


def seed(text: str) -> int:
    """Type of an argparse argument: the seed of a random stream."""
    return _integer(text, 0, f"an integer from 0 to {MOST}")


def _integer(text: str, least: int, what: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if not least <= number <= MOST:
        raise argparse.ArgumentTypeError(f"must be {what}, got {shortened(text)}")
    return number


def zero_or_more(text: str) -> int:
    """Type of an argparse argument: an integer, 0 or above."""
    return _integer(text, 0, "0 or an integer above it")


def shard(text: str) -> tuple[int, int]:
    """Type of an argparse argument: ``i/n``, one of n equal parts, counted from 0."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count) <= MOST):
        raise argparse.ArgumentTypeError(f"must be i/n with i from 0 to n - 1, got {shortened(text)}")
    return int(index), int(count)


def number(text: str) -> float:
    """Type of an argparse argument: a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, got {shortened(text)}")
    return value


def shortened(text: str) -> str:
    """``text`` as a message shows it."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


def words(text: str) -> str:
    """Type of an argparse argument that names no file: a name, a prompt, a list of names."""
    return text


def path(text: str) -> Path:
    """Type of an argparse argument: a file or folder, with ``~`` and variables filled in (paths.py)."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    """As ``path``, for what is only the beginning of a path, or may be something else: a prefix, a model's name."""
    return _expanded(expand, text)


def job_path(text: str) -> str:
    """As ``path_text``, for a job that is submitted from here."""
    return _expanded(expand_for_job, text)


def script_path(text: str) -> str:
    """As ``path_text``, for the script of a job: variables of the job's own are left to its shell."""
    return _expanded(expand_in_script, text)


def sbatch_option(text: str) -> str:
    """Type of an argparse argument: ``--OPTION=VALUE`` of sbatch, which fills in nothing but ``%``."""
    name, equals, value = text.partition("=")
    return name + equals + (job_path(value) if value else "")


def _expanded(how: Callable[[str], str], text: str) -> str:
    try:
        return how(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output(text: str) -> str:
    """Type of an argparse argument: a file or prefix to write, in a folder that exists or can be made later."""
    target = path_text(text)
    reason = unwritable(Path(target).parent)
    if reason is not None:
        raise argparse.ArgumentTypeError(f"cannot write to {target}: {reason}")
    return target
