"""The format of ``metrics.jsonl``: one strict JSON object for each report, and how to read them back.

An object starts with ``kind``, ``step`` and ``time`` (seconds since the epoch). JSON has no NaN and no infinity:
such a value is written as null, and the object's ``nonfinite`` maps its place to its name, so that any parser
can read the file and nothing is lost:

    {"kind":"train","step":7,"time":1700000000.0,"loss":null,"lr":0.1,"nonfinite":{"loss":"NaN"}}

A place inside a nested value is a path with slashes: "ema/3/1". A run that dies after its last checkpoint
leaves records of steps that the resumed run takes again. The file is only ever appended to; a record of
kind "resume" at step N declares every earlier record of a later step void (at step 0, a fresh start: every
earlier record), and ``read_metrics`` obeys.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_sgt.errors import DataError
from megatron_sgt.files import Appender

_NONFINITE = "nonfinite"
_NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _name_of(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _strict(value: Any, place: str, nonfinite: dict[str, str]) -> Any:
    """``value`` as JSON-able objects; what is not finite becomes None and is noted under its place."""
    if type(value).__module__ == "numpy":
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[place] = _name_of(value)
        return None
    if isinstance(value, Mapping):
        return {str(key): _strict(item, f"{place}/{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item, f"{place}/{index}", nonfinite) for index, item in enumerate(value)]
    return str(value) if isinstance(value, Path) else value


def encode(kind: str, record: Mapping[str, Any]) -> str:
    """One line of the file, without its newline.

    Raises:
        TypeError: a value that is no host data.
    """
    nonfinite: dict[str, str] = {}
    head = {"kind": kind, **{key: record[key] for key in ("step", "time") if key in record}}
    plain = {str(key): _strict(item, str(key), nonfinite) for key, item in {**head, **record}.items()}
    if nonfinite:
        plain[_NONFINITE] = nonfinite
    return json.dumps(plain, allow_nan=False, separators=(",", ":"))


def decode(line: str) -> dict[str, Any]:
    """The record of one line, NaN and infinities restored.

    Raises:
        ValueError: it is no such line.
    """
    record = json.loads(line)
    if not isinstance(record, dict) or "kind" not in record:
        raise ValueError("not an object with a kind")
    for place, name in record.pop(_NONFINITE, {}).items():
        *path, last = place.split("/")
        holder: Any = record
        for key in path:
            holder = holder[int(key)] if isinstance(holder, list) else holder[key]
        holder[int(last) if isinstance(holder, list) else last] = _NAMES[name]
    return record


class JsonlWriter:
    """Appends records to a file, each with the system before ``write`` returns.

    The folder is made. A line that an earlier process left unfinished is cut off, so that every line of the
    file can be parsed. A file that is deleted or moved away meanwhile is made again, with the next record.

    Raises:
        OSError: the record cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open()

    def _open(self) -> None:
        _cut_unfinished_line(self.path)
        self._file = Appender(self.path)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Append one record, wholly or, when the disk is full, not at all."""
        if not self._file.is_there():
            self._file.close()
            self._open()
            print(
                f"warning: {self.path} was deleted or moved away: it is made again, and begins at step "
                f"{record.get('step')}",
                file=sys.stderr,
            )
        self._file.append(f"{encode(kind, record)}\n".encode())

    def advance(self, step: int) -> None:
        """Nothing: a step without a report leaves no trace."""

    def close(self) -> None:
        self._file.close()


def _cut_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "r+b") as file:
        end = file.seek(0, 2)
        keep = end
        while keep > 0:
            start = max(0, keep - 65536)
            file.seek(start)
            newline = file.read(keep - start).rfind(b"\n")
            if newline >= 0:
                keep = start + newline + 1
                break
            keep = start
        if keep < end:
            file.truncate(keep)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records that count, in the order of the file: what a resume declared void is left out.

    An unfinished last line, as a killed process leaves it, is ignored.

    Raises:
        DataError: the file is missing or holds another line that is no record.
    """
    damaged: list[int] = []
    records = read_all(path, damaged)
    if damaged:
        line = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")[damaged[0] - 1]
        raise DataError(f"{path}, line {damaged[0]} is no metrics record: {line[:80]!r}")
    return without_void_records(records)


def read_all(path: str | Path, damaged: list[int]) -> list[dict[str, Any]]:
    """Every record of the file, void ones too; the numbers (from 1) of lines that are none go to ``damaged``.

    An unfinished last line is ignored.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"cannot read the metrics file {path}: {error.strerror}") from error
    *lines, unfinished = text.split("\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate([*lines, unfinished], start=1):
        if not line:
            continue
        try:
            records.append(decode(line))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            if number <= len(lines):
                damaged.append(number)
    return records


def _step_of(record: Mapping[str, Any]) -> float:
    step = record.get("step", 0)
    return step if isinstance(step, int | float) else 0


def without_void_records(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """``records`` without those that a later resume declared void: the later steps, and at step 0 all."""
    kept: list[dict[str, Any]] = []
    for record in records:
        if record.get("kind") == "resume":
            resumed_at = _step_of(record)
            kept = [r for r in kept if resumed_at and _step_of(r) <= resumed_at]
        kept.append(record)
    return kept
