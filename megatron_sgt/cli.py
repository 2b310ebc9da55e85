"""What every command line of the project shares: how it ends."""

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from megatron_sgt.errors import SGTError

INTERRUPTED = 130
BROKEN_PIPE = 141


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
        code = INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more on its way out, which would fail again and print a warning.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    sys.exit(code)
