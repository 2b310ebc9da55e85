"""stdout and stderr that end no command, whatever their encoding lacks and however full their disk is. No torch."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from typing import IO, Any, TextIO

ERRORS = "megatron_sgt.plain"
"""Name of the error handler that writes a sign in ASCII where the encoding lacks it."""

PLAIN = {
    "·": "-", "×": "x", "±": "+-", "…": "...", "→": "->", "←": "<-", "≤": "<=", "≥": ">=", "−": "-", "–": "-",
    "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'", "│": "|", "─": "-", "█": "#", "√": "sqrt", "²": "^2", "Σ": "sum",
}  # fmt: skip
"""What stands for the signs of our own messages. Others, as in the name of a file, become ``\\u....``."""

LOST = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE)
"""Errors of a stream that a run outlives: disk or quota full, file too large, device or reader gone."""


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(
        PLAIN.get(sign) or sign.encode("ascii", "backslashreplace").decode("ascii") for sign in text
    ), error.end


def make_readable() -> None:
    """Let stdout and stderr of this process write every text, in whatever encoding they have."""
    codecs.register_error(ERRORS, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ERRORS)


def outlive_full_disks() -> None:
    """Let the prints of this process never fail: what stdout or stderr cannot take is counted and lost.

    The first loss is said on stderr at once, and their number by ``report_losses``.
    """
    make_readable()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__") or not isinstance(stream, io.TextIOWrapper):
            continue  # somebody's own, as a test's
        stream.flush()
        lossy: Any = _Lossy(stream.fileno(), name)
        # PYTHONUNBUFFERED takes the buffer out.
        buffer = lossy if stream.write_through else io.BufferedWriter(lossy)
        outliving = io.TextIOWrapper(
            buffer,
            encoding=stream.encoding,
            errors=stream.errors,
            line_buffering=stream.line_buffering or name == "stderr",
            write_through=stream.write_through,
        )
        setattr(sys, name, outliving)


def report_losses() -> None:
    """Say on stderr what the streams have lost, if anything."""
    for stream in (sys.stdout, sys.stderr):
        buffer = getattr(stream, "buffer", None)
        raw = getattr(buffer, "raw", buffer)
        if isinstance(raw, _Lossy):
            stream.flush()
            raw.report()


def is_utf8(stream: TextIO) -> bool:
    """Whether ``stream`` can take every sign as it is."""
    return (stream.encoding or "").lower().replace("_", "-") in ("utf-8", "utf8")


def discard(stream: IO[str]) -> None:
    """Send what ``stream`` still holds, and all that follows, to nowhere: Python flushes it once more at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Lossy(io.RawIOBase):
    """The file ``descriptor``; writes that fail with an error of LOST are counted and dropped."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._name = name
        self._lost = 0
        self._reason = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: memoryview | bytes, /) -> int:  # type: ignore[override]
        """Write all of ``data``, or drop the rest of it."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            if error.errno not in LOST:
                raise
            self._lose(len(rest), os.strerror(error.errno))
        return size

    def report(self) -> None:
        """Say how much was lost."""
        if self._lost:
            self._say(f"{self._name} has lost {self._lost:,} bytes ({self._reason}): the output has gaps")

    def _lose(self, size: int, reason: str) -> None:
        self._lost, self._reason, first = self._lost + size, reason, not self._lost
        if first:
            self._say(f"{self._name} cannot be written ({reason}); the run goes on and tries again")

    @staticmethod
    def _say(text: str) -> None:
        with contextlib.suppress(OSError):  # nothing is left to say it on
            os.write(2, f"warning: {text}\n".encode())
