"""What the data of a run that goes on has in common with what its checkpoint has read. For one rank."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_sgt.checkpoint.forms import read_config
from megatron_sgt.checkpoint.layout import DATA_STATE
from megatron_sgt.config import Config
from megatron_sgt.data.changes import Change, find_change
from megatron_sgt.data.history import Span, from_json, order_of, to_json
from megatron_sgt.data.index_cache import build_index_cache, index_folder
from megatron_sgt.data.splits import SplitPart
from megatron_sgt.errors import CheckpointError, SGTError
from megatron_sgt.metrics.records import DataRecord
from megatron_sgt.preflight import Start


@dataclass(frozen=True)
class DataStart:
    """``record``: for the checkpoints to come, JSON-able; ``change``: None where the order is the former one."""

    record: list[dict[str, Any]]
    change: Change | None = None


def data_start(config: Config, start: Start, keep_indices: bool = True) -> DataStart:
    """Compare the data of ``config`` with what the checkpoint of ``start`` has read.

    Args:
        keep_indices: False builds no sample indices that outlast this call, for a dry run.

    Raises:
        CheckpointError: documents that were held out would be trained on, or the reverse, without
            data.allow_validation_leak; or the checkpoint's record of its data is damaged.
        DataError: a file is missing or damaged.
    """
    now = order_of(config)
    consumed = start.saved["trainer"]["consumed_samples"] if start.folder is not None else 0
    if start.folder is None or not consumed:
        return DataStart(to_json((), now, 0))
    spans, doubt = _spans(start.folder, start.saved, consumed)
    if spans is None:
        change: Change | None = Change((f"data of {start.folder.name}",), consumed, unknown=(doubt,))
        return DataStart(to_json((), now, consumed), change)
    with ExitStack() as stack:
        root = str(config.data_cache_dir)
        other = root if keep_indices else stack.enter_context(TemporaryDirectory())
        change = find_change(spans, now, _Indices(root, other))
    if change is not None and doubt:
        change = replace(change, unknown=(*change.unknown, doubt))
    if change is not None and change.leaks and not config.data.allow_validation_leak:
        raise CheckpointError(f"checkpoint {start.folder}: {change.problem()}")
    return DataStart(to_json(spans, now, consumed), change)


def record_at(saved: dict[str, Any], record: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record of a run with ``record`` that goes back to the checkpoint whose state is ``saved``."""
    consumed = saved["trainer"]["consumed_samples"]
    ours = from_json(record, max(consumed, record[-1]["from_sample"]))
    return to_json(from_json(saved[DATA_STATE], consumed) if DATA_STATE in saved else ours, ours[-1].order, consumed)


def data_record(change: Change, step: int) -> DataRecord:
    """What the metrics say of a change."""
    record: DataRecord = {"step": step, "line": change.line(), "changed": change.differences}
    if (tally := change.tally) is not None:
        record |= {
            "tokens_again": tally.tokens_again,
            "documents_again": tally.documents_again,
            "windows_again": tally.windows_again,
            "tokens_skipped": tally.tokens_skipped,
            "documents_skipped": tally.documents_skipped,
            "exact": tally.exact,
            "held_out_trained": change.held_out_trained,
            "trained_held_out": change.trained_held_out,
        }
    return record


def _spans(folder: Path, saved: dict[str, Any], consumed: int) -> tuple[tuple[Span, ...] | None, str]:
    """What the checkpoint has read, and what is not certain of it; None where nothing can be told."""
    if DATA_STATE in saved:
        try:
            return from_json(saved[DATA_STATE], consumed), ""
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {folder}: {error}") from error
    try:
        order = order_of(read_config(folder))
    except SGTError as error:
        return None, f"it does not say what it has read, and its files cannot be looked at ({error})"
    return (Span(order, 0, consumed),), "the checkpoint does not say what its files held: taken as they are now"


class _Indices:
    """Sample indices below ``root``; those that are not there are built below ``other``."""

    def __init__(self, root: str, other: str) -> None:
        self._root, self._other = root, other

    def __call__(
        self, prefix: str, parts: tuple[SplitPart, ...], digest: str, seq_length: int, seed: int, packing: str
    ) -> str:
        there = index_folder(prefix, parts, digest, seq_length, seed, self._root, packing)
        root = self._root if there.is_dir() else self._other
        return build_index_cache(prefix, parts, digest, seq_length, seed, root, packing)
