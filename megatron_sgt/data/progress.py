"""Progress of a long job over its input: a bar on a terminal, an occasional line in a log file."""

import sys
import time
from types import TracebackType
from typing import TextIO

from megatron_sgt.metrics.units import duration

LINE_EVERY_SECONDS = 30.0


def note(line: str) -> None:
    """Tell the user of something that is no error, on stderr."""
    print(f"note: {line}", file=sys.stderr, flush=True)


class Progress:
    """Shows progress through ``total_bytes``, results so far, rate and time left, on stderr."""

    def __init__(
        self,
        label: str,
        total_bytes: int,
        stream: TextIO | None = None,
        line_every_seconds: float = LINE_EVERY_SECONDS,
    ) -> None:
        self._label = label
        self._total = max(1, total_bytes)
        self._stream = stream or sys.stderr
        self._every = line_every_seconds
        self._start = self._last_line = time.monotonic()
        self._bar = None
        if self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc=label, file=self._stream)

    def update(self, done_bytes: int, documents: int, tokens: int) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(f"{documents:,} documents, {tokens:,} tokens", refresh=False)
            self._bar.update(done_bytes - self._bar.n)
        elif now - self._last_line >= self._every:
            self._last_line = now
            elapsed = now - self._start
            left = elapsed * (self._total - done_bytes) / max(1, done_bytes)
            print(
                f"{self._label} {100 * done_bytes / self._total:5.1f}%  {documents:,} documents  {tokens:,} "
                f"tokens  {tokens / elapsed:,.0f} tokens/s  eta {duration(left)}",
                file=self._stream,
                flush=True,
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
