"""Ranges of the data that a run goes past: where it goes on, and that the file outlives the process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sgt.engine.skipped_ranges import PASSED_FILE, SkippedRanges, batches_outside
from megatron_sgt.errors import CheckpointError


def test_where_the_data_goes_on(tmp_path: Path) -> None:
    skipped = SkippedRanges(tmp_path, [(32, 56), (32, 80), (80, 88), (120, 128)])
    places = {0: 0, 24: 24, 32: 88, 40: 88, 79: 88, 80: 88, 88: 88, 120: 128}
    assert {start: skipped.after(start) for start in places} == places
    assert [skipped.next_start(n) for n in (0, 32, 88, 120)] == [32, 80, 120, None]


def test_the_file(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    skipped = SkippedRanges(root)
    skipped.add(32, 56)
    skipped.add(64, 72)
    skipped.write()
    assert SkippedRanges.read(root).ranges == [(32, 56), (64, 72)]
    assert SkippedRanges.read(tmp_path / "nowhere").ranges == []
    (root / PASSED_FILE).write_text('{"ranges": [[1]]}')
    with pytest.raises(CheckpointError, match=r"is damaged .*; delete it"):
        SkippedRanges.read(root)


def test_what_a_start_takes_along(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    there = SkippedRanges(other, [(8, 16)])
    there.write()
    assert SkippedRanges.at_start(own / "global_step3", own).ranges == []
    assert SkippedRanges.at_start(other / "global_step3", own).ranges == [(8, 16)]
    assert SkippedRanges.at_start(own / "global_step3", own).ranges == [(8, 16)], "written beside the new run's own"
    assert SkippedRanges.at_start(None, own).ranges == [] and not (own / PASSED_FILE).exists()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*passed_data\.json"):
        SkippedRanges(tmp_path / "file", [(1, 2)]).write()


def test_batches_jump_at_the_ranges(tmp_path: Path) -> None:
    """Steps of 8 samples in two micro-batches; the loader is opened again after a range."""

    def loader(consumed: int) -> Any:
        opened.append(consumed)
        state = SimpleNamespace(consumed=consumed, handed=0)

        class Loader:
            consumed_samples = property(lambda self: state.consumed + state.handed // 2 * 8)

            def __next__(self) -> Any:
                state.handed += 1
                return {"first": state.consumed + (state.handed - 1) // 2 * 8}

        return Loader()

    opened: list[int] = []
    batches = batches_outside(loader, SkippedRanges(tmp_path, [(16, 40), (48, 56)]), 0)
    firsts = [int(next(batches)["first"]) for _ in range(10)]
    assert firsts == [0, 0, 8, 8, 40, 40, 56, 56, 64, 64]
    assert opened == [0, 40, 56]
    assert next(batches_outside(loader, SkippedRanges(tmp_path, [(16, 40)]), 16))["first"] == 40
