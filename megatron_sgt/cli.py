"""What every command line of the project shares: how it ends, and arguments that are checked before any work."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_sgt.errors import ExitCode, SGTError


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Run ``main`` and leave the process with its exit code.

    0 (or what ``main`` returns): done. An :class:`SGTError` is a user's mistake: its message on stderr
    without a traceback, and its own exit code. 2: usage (from argparse). 130: interrupted from the keyboard.
    141: the reader of the output went away (``| head``). Any other exception is a bug: traceback and exit
    code 1.
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


def output(text: str) -> str:
    """Type of an argparse argument: a file or prefix to write. Its folder is made later, if it can be."""
    reason = unwritable(Path(text).parent)
    if reason is not None:
        raise argparse.ArgumentTypeError(f"cannot write to {text}: {reason}")
    return text


def unwritable(folder: Path) -> str | None:
    """Why ``folder`` can be neither made nor written to; None if it can."""
    place = nearest(folder)
    if not place.is_dir():
        return f"{place} is a file"
    return None if os.access(place, os.W_OK | os.X_OK) else f"{place} is not writable"


def nearest(path: Path) -> Path:
    """``path``, or the nearest place above it that exists."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if os.path.lexists(place))
