"""The console of rank 0: one line for each report, colour and a progress bar on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TextIO

from megatron_sgt.metrics import lines, megatron_lines

LineFormat = Callable[[Mapping[str, Any], lines.Paint], str]

_SGT: dict[str, LineFormat] = {
    "train": lines.train_line,
    "valid": lines.valid_line,
    "tasks": lines.tasks_line,
    "growth": lines.growth_line,
    "length": lines.length_line,
    "phase": lines.phase_line,
    "grow": lines.grow_line,
    "save": lines.save_line,
    "save_failed": lines.save_failed_line,
    "resume": lines.resume_line,
    "data": lines.data_line,
    "ranks": lines.ranks_line,
    "rollback": lines.rollback_line,
    "stop": lines.stop_line,
    "hook": lines.hook_line,
    "summary": lines.summary_line,
}
# Megatron's log has no growth, and its parsers skip lines that they do not know.
STYLES: dict[str, dict[str, LineFormat]] = {
    "sgt": _SGT,
    "megatron": {
        **_SGT,
        "train": megatron_lines.train_line,
        "valid": megatron_lines.valid_line,
        "save": megatron_lines.save_line,
    },
}

_ANSI = {"bad": "1;31", "warn": "33", "event": "1;36", "good": "32"}


def colored(role: str, text: str) -> str:
    """The paint of a terminal: ANSI colours, reset at the end."""
    return f"\x1b[{_ANSI[role]}m{text}\x1b[0m"


def is_terminal(stream: TextIO) -> bool:
    """True if the stream is a terminal that understands cursor movement."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def paint_for(stream: TextIO) -> lines.Paint:
    """Colours on a terminal unless NO_COLOR is set to anything (https://no-color.org); none elsewhere."""
    return colored if is_terminal(stream) and not os.environ.get("NO_COLOR") else lines.plain


class ConsoleWriter:
    """Prints every record as one line, above a progress bar if there is one.

    style: "sgt" or "megatron"; progress_bar: "auto" (on a terminal), "on" or "off"; total_steps: the bar's
    end; stream: sys.stdout by default.

    Raises:
        ValueError: another style or progress_bar.
    """

    def __init__(
        self,
        style: Literal["sgt", "megatron"] = "sgt",
        progress_bar: Literal["auto", "on", "off"] = "auto",
        total_steps: int | None = None,
        stream: TextIO | None = None,
    ) -> None:
        if style not in STYLES:
            raise ValueError(f"style must be one of {sorted(STYLES)}, got {style!r}")
        if progress_bar not in ("auto", "on", "off"):
            raise ValueError(f"progress_bar must be auto, on or off, got {progress_bar!r}")
        self._stream = sys.stdout if stream is None else stream
        self._formats = STYLES[style]
        self._paint = paint_for(self._stream)
        self._total_steps = total_steps
        wanted = progress_bar == "on" or (progress_bar == "auto" and is_terminal(self._stream))
        self._bar_wanted = wanted and total_steps is not None
        self._bar: Any = None

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Print the record, unless its line is empty.

        Raises:
            KeyError: its kind has no format.
        """
        text = self._formats[kind](record, self._paint)
        if not text:
            return
        if kind == "summary":
            self._end_bar()
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._stream, flush=True)
        if kind == "train":
            self._move_bar(record["step"], self._postfix(record))
        if self._bar is not None:
            self._bar.refresh()

    def advance(self, step: int) -> None:
        self._move_bar(step, None)

    def close(self) -> None:
        self._end_bar()

    @staticmethod
    def _postfix(record: Mapping[str, Any]) -> str:
        line = lines.train_line({key: record.get(key) for key in ("step", "loss", "eta_s")})
        return line.partition("  ")[2]

    def _move_bar(self, step: int, postfix: str | None) -> None:
        if not self._bar_wanted:
            return
        if self._bar is None:
            self._bar = self._make_bar(step)
        if postfix is not None:
            self._bar.set_postfix_str(postfix, refresh=False)
        # A rollback moves the bar back, which update() cannot.
        if step >= self._bar.n:
            self._bar.update(step - self._bar.n)
        else:
            self._bar.n = step
            self._bar.refresh()

    def _make_bar(self, step: int) -> Any:
        # Imported here: a run that writes to a file has no bar.
        from tqdm import tqdm

        return tqdm(
            total=self._total_steps,
            initial=step,
            file=self._stream,
            dynamic_ncols=True,
            leave=False,
            bar_format="{percentage:5.1f}% |{bar}| {n_fmt}/{total_fmt} steps{postfix}",
        )

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._bar_wanted = False
