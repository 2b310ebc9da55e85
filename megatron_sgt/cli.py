"""What all command lines share: exit codes, and arguments that are checked before any work starts."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_sgt.errors import ExitCode, SGTError
from megatron_sgt.files import unwritable


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and leave the process with its exit code.

    0 (or what ``main`` returns): done. An ``SGTError`` is a user's mistake: its message goes to stderr
    without a traceback, and it has its own exit code. 2: usage (from argparse). 130: Ctrl-C. 141: the reader of the
    output went away (``| head``). Any other exception is a bug: traceback and exit code 1.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except SGTError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, which would fail again and print a warning.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = ExitCode.BROKEN_PIPE
    sys.exit(code)


def positive(text: str) -> int:
    """Type of an argparse argument: an integer above 0."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer above 0, got {text!r}")
    return number


def zero_or_more(text: str) -> int:
    """Type of an argparse argument: an integer, 0 or above."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or an integer above it, got {text!r}")
    return number


def output(text: str) -> str:
    """Type of an argparse argument: a file or prefix to write, in a folder that exists or can be made later."""
    reason = unwritable(Path(text).parent)
    if reason is not None:
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {reason}")
    return text
