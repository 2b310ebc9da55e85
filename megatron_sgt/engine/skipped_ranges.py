"""Ranges of the data order that a run skips without training on them, kept beside its checkpoints.

A range [start, stop) counts sequences of the data order, as TrainState.consumed_samples does. The file outlives
the process, so that a run that is started again from a checkpoint before a range skips it, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_sgt.checkpoint.forms import fields, whole
from megatron_sgt.checkpoint.layout import PASSED_FILE, read_json
from megatron_sgt.data.loader import MicroBatch, TrainLoader
from megatron_sgt.errors import CheckpointError
from megatron_sgt.files import replace_text


class SkippedRanges:
    """The ranges of the run that saves into ``root``."""

    def __init__(self, root: Path, ranges: list[tuple[int, int]] | None = None) -> None:
        self.root = root
        self.ranges: list[tuple[int, int]] = list(ranges or [])

    @classmethod
    def read(cls, root: Path) -> SkippedRanges:
        """The ranges on disk; none without the file.

        Raises:
            CheckpointError: the file is damaged.
        """
        path = root / PASSED_FILE
        if not os.path.lexists(path):
            return cls(root)
        try:
            found = read_json(path)
            ranges = [
                (whole(start, "the start of a range"), whole(stop, "the end of a range", start))
                for start, stop in fields(found, "it")["ranges"]
            ]
            return cls(root, ranges)
        except (CheckpointError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it to train on all data, or copy it again"
            ) from error

    @classmethod
    def at_start(cls, checkpoint: Path | None, root: Path) -> SkippedRanges:
        """The ranges of a run that starts from ``checkpoint`` (None: from nothing) and saves into ``root``.

        The file beside the checkpoint comes with it; a fresh start deletes the run's own. For one rank.

        Raises:
            CheckpointError: a file of ranges cannot be read or written.
        """
        if checkpoint is None:
            (root / PASSED_FILE).unlink(missing_ok=True)
            return cls(root)
        found = cls.read(checkpoint.parent)
        ours = cls(root, found.ranges)
        if found.ranges and checkpoint.parent.resolve() != root.resolve():
            ours.write()
        return ours

    def add(self, start: int, stop: int) -> None:
        """Skip [start, stop) from now on; every call adds one entry, as their number counts."""
        self.ranges.append((start, stop))

    def write(self) -> None:
        """Replace the file atomically; for one rank.

        Raises:
            CheckpointError: it cannot be written.
        """
        path, lines = self.root / PASSED_FILE, ",\n  ".join(f"[{a}, {b}]" for a, b in self.ranges)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            replace_text(path, f'{{"ranges": [\n  {lines}\n]}}\n')
        except OSError as error:
            raise CheckpointError(
                f"cannot write {path}: {error.strerror}; make room, and start again: the run goes on from the newest "
                "checkpoint"
            ) from error

    def after(self, consumed: int) -> int:
        """Where the data continues for a run that has consumed so many sequences."""
        while True:
            stops = [stop for start, stop in self.ranges if start <= consumed < stop]
            if not stops:
                return consumed
            consumed = max(stops)

    def next_start(self, consumed: int) -> int | None:
        """The start of the next range after ``consumed``; None if there is none."""
        return min((start for start, _ in self.ranges if start > consumed), default=None)


def batches_outside(
    open_at: Callable[[int], TrainLoader], skipped: SkippedRanges, consumed: int
) -> Iterator[MicroBatch]:
    """Whole steps from ``consumed`` on, past the ranges; ``open_at`` opens a loader after so many sequences."""
    position = consumed
    while True:
        position = skipped.after(position)
        loader, end = open_at(position), skipped.next_start(position)
        while end is None or loader.consumed_samples < end:
            yield next(loader)
        position = loader.consumed_samples  # behind the start of the range after a change of the batch size
