"""How far a preprocessing has come, on disk, so that another process goes on where a killed one was.

PREFIX.resume names the input and the settings, and a place in the input together with the sizes that the outputs had
there. What a killed process has written behind that place is cut off and made again, so the result has the same bytes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sgt.data.documents import BadDocument, Position
from megatron_sgt.data.inputs import InputFile
from megatron_sgt.data.writer import Written
from megatron_sgt.errors import DataError
from megatron_sgt.files import replace_text

SAVE_EVERY_SECONDS = 10.0


@dataclass(frozen=True)
class Origin:
    """All that the content of a data set follows from. JSON, so that it can be kept."""

    settings: dict[str, Any]
    """Option -> its value, as the user knows them."""
    inputs: list[list[Any]]
    """[path, how it is read, bytes, time of the last change in ns] of each file, in their order."""

    @staticmethod
    def of(settings: dict[str, Any], files: Sequence[InputFile]) -> Origin:
        """Of a run that begins now."""
        return Origin(
            settings,
            [
                [
                    os.path.abspath(file.path),
                    " ".join(filter(None, (file.kind, file.compression))),
                    file.size,
                    os.stat(file.path).st_mtime_ns,
                ]
                for file in files
            ],
        )

    def change(self, now: Origin) -> str | None:
        """What is otherwise ``now``, by name; None if nothing is."""
        for name in {**self.settings, **now.settings}:
            before, after = self.settings.get(name), now.settings.get(name)
            if before != after:
                return f"{name} was {_shown(before)} and is {_shown(after)} now"
        old, new = ({path: about for path, *about in inputs} for inputs in (self.inputs, now.inputs))
        for path, about in old.items():
            if path not in new:
                return f"{path} is no longer among the inputs"
            if new[path] != about:
                return f"{path} has changed since"
        if added := [path for path in new if path not in old]:
            return f"{added[0]} is a new input"
        return None if list(old) == list(new) else "the inputs are in another order"


def _shown(value: Any) -> str:
    text = ", ".join(value) if isinstance(value, list) else json.dumps(value)
    return text if len(text) <= 40 else f"{text[:12]}…"


@dataclass(frozen=True)
class Mark:
    """A place between two documents, and what was written when all before it was."""

    written: tuple[Written, ...]
    """Of each key's data set."""
    position: Position | None = None
    """None: the beginning."""
    bytes_read: int = 0
    repaired: int = 0
    bad: int = 0
    first_bad: BadDocument | None = None
    is_end: bool = False
    """The input is read to its end."""


class Journal:
    """PREFIX.resume: written every SAVE_EVERY_SECONDS, removed when the data sets are complete."""

    def __init__(self, prefix: str, origin: Origin, overwrite: bool) -> None:
        self.path = Path(prefix + ".resume")
        self.overwrite = overwrite
        self._origin = origin
        self._saved = time.monotonic()

    @property
    def is_due(self) -> bool:
        return time.monotonic() - self._saved >= SAVE_EVERY_SECONDS

    def save(self, mark: Mark) -> None:
        """Keep ``mark``: what it counts is on disk already."""
        record = {"origin": asdict(self._origin), "overwrite": self.overwrite, "mark": asdict(mark)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.path, json.dumps(record) + "\n")
        self._saved = time.monotonic()

    def read(self) -> Mark | None:
        """What another process has kept; None: nothing. Whether it may overwrite holds for this one, too.

        Raises:
            DataError: it had other inputs or settings, or the file is damaged.
        """
        try:
            record = json.loads(self.path.read_text(encoding="utf-8", errors="surrogateescape"))
            origin, mark = Origin(**record["origin"]), _mark(record["mark"])
            self.overwrite = bool(record["overwrite"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self.path} is damaged: {error!r}; start again without --resume") from error
        if change := origin.change(self._origin):
            raise DataError(f"cannot go on with {self.path}: {change}; change it back, or start again without --resume")
        return mark

    def remove(self) -> None:
        """Nothing is left to go on with."""
        self.path.unlink(missing_ok=True)


def _mark(fields: dict[str, Any]) -> Mark:
    fields = dict(fields)
    fields["written"] = tuple(Written(**written) for written in fields["written"])
    fields["position"] = Position(*fields["position"]) if fields["position"] else None
    fields["first_bad"] = BadDocument(**fields["first_bad"]) if fields["first_bad"] else None
    return Mark(**fields)
