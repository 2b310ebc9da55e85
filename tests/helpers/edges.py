"""Tables of inputs that people really give: what each must end with, on a terminal of any encoding."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from tests.helpers.commands import Finished, run_script, snapshot

ENCODINGS = ("ascii", "iso8859-2", "utf-8")
"""What terminals take: the C locale, one with single-byte characters, the usual one."""


def refused(finished: Finished, code: int, *said: str) -> str:
    """The one line of a command that refuses its input: exit code ``code``, no traceback, every regular expression
    of ``said`` in the line.

    Raises:
        AssertionError: it ended otherwise.
    """
    everything = f"exit code {finished.code}\n{finished.out}\n{finished.err}"
    assert finished.code == code, everything
    assert "Traceback" not in finished.err + finished.out, everything
    lines = [line for line in finished.err.splitlines() if line.startswith("error: ") or ": error: " in line]
    assert len(lines) == 1, everything
    for expression in said:
        assert re.search(expression, lines[0]), f"{expression!r} is not in {lines[0]!r}"
    return lines[0]


def in_every_encoding(
    script: str, arguments: list[str], cwd: Path, code: int, *said: str, check: Callable[[Finished], None] | None = None
) -> None:
    """Run ``script`` as :func:`run_script` does, once per encoding of ENCODINGS; it must end with ``code``.

    A ``code`` other than 0 is a refusal: one line (:func:`refused`), and nothing in ``cwd`` has changed.
    """
    for encoding in ENCODINGS:
        before = snapshot(cwd)
        finished = run_script(script, arguments, cwd, before=functools.partial(use_encoding, encoding))
        if code:
            refused(finished, code, *said)
            assert snapshot(cwd) == before, f"{encoding}: something was written"
        else:
            assert finished.code == 0, f"{encoding}: {finished.out}\n{finished.err}"
        if check is not None:
            check(finished)


def use_encoding(encoding: str) -> None:
    """Give this process the streams that Python opens under a locale of ``encoding``; its children get them too."""
    os.environ["PYTHONIOENCODING"] = encoding
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding=encoding, errors="backslashreplace" if stream is sys.stderr else "strict")
