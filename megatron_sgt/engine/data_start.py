"""Where the data of a run goes on that starts from a checkpoint, and what of it was read before. For one rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_sgt.checkpoint.forms import read_config
from megatron_sgt.checkpoint.layout import DATA_STATE
from megatron_sgt.config import Config
from megatron_sgt.data.changes import Change, changed_files, find_change
from megatron_sgt.data.history import DataFile, DataOrder, grown_files, order_of
from megatron_sgt.data.index_cache import build_index_cache, index_folder
from megatron_sgt.data.indexed import sequence_lengths
from megatron_sgt.data.ledger import Begins, Ledger, Read, Span, ledger_from_json
from megatron_sgt.data.splits import SplitPart
from megatron_sgt.errors import CheckpointError, DataError, SGTError
from megatron_sgt.metrics.records import DataRecord
from megatron_sgt.preflight import Start


@dataclass(frozen=True)
class DataStart:
    """The same on all ranks. ``orders``: of every blend of the run, by its data_path.

    ``change``: None where the order is the former one.
    """

    ledger: Ledger
    orders: dict[tuple[str, ...], DataOrder]
    begins: Begins
    change: Change | None = None


def data_start(config: Config, start: Start, keep_indices: bool = True) -> DataStart:
    """Find the place of ``config`` in its data, and compare it with what the checkpoint of ``start`` has read.

    Args:
        keep_indices: False builds no sample indices that outlast this call, for a dry run.

    Raises:
        CheckpointError: documents that were held out would be trained on, or the reverse, or a set of data.valid was
            trained on, without data.allow_validation_leak; or the checkpoint's record of its data is damaged.
        DataError: a file is missing or damaged, or holds other documents than what was read under its name, without
            data.allow_changed_data.
    """
    orders = {path: order_of(config, path) for path in config.data_paths}
    trainer = start.saved["trainer"] if start.folder is not None else {"step": 0, "consumed_samples": 0}
    consumed, now = trainer["consumed_samples"], orders[config.data_path_at(trainer["step"])]
    files = [file for order in orders.values() for file in order.files]
    if start.folder is None or not consumed:
        return DataStart(Ledger((Span(0, now),)), orders, grown_files(files, files))
    before, doubt = _ledger(start.folder, start.saved)
    if before is None:
        change: Change | None = Change((f"data of {start.folder.name}",), unknown=(doubt,))
        return DataStart(Ledger((Span(consumed, now),)), orders, grown_files(files, files), change)
    begins = grown_files([file for span in before.spans for file in span.order.files] + files, files)
    before = _with_samples(before, files, begins)
    reads = before.until(consumed)
    if not config.data.allow_changed_data:
        _refuse_changed(start.folder, reads, orders.values(), begins)
    if not config.data.allow_validation_leak:
        _refuse_trained(config, start.folder, reads)
    ledger = before.turned(now, consumed, begins)
    with ExitStack() as stack:
        root = str(config.data_cache_dir)
        other = root if keep_indices else stack.enter_context(TemporaryDirectory())
        change = find_change(reads, ledger.now, begins, _Indices(root, other))
    if reads and reads[-1].order.same(orders[config.data_path_at(trainer["step"] - 1)]):
        change = None  # the run stopped where a phase turns the blend, which the phase says
    if change is not None and doubt:
        change = replace(change, unknown=(*change.unknown, doubt))
    if change is not None and change.leaks and not config.data.allow_validation_leak:
        raise CheckpointError(f"checkpoint {start.folder}: {change.problem()}")
    return DataStart(ledger, orders, begins, change)


def _refuse_changed(folder: Path, reads: Sequence[Read], orders: Iterable[DataOrder], begins: Begins) -> None:
    for order in orders:
        for then, now in changed_files(reads, order, begins):
            raise DataError(
                f"{now.prefix} is other data than checkpoint {folder} has read under this name: {now.documents:,} "
                f"documents ({now.tokens:,} tokens), then {then.documents:,} ({then.tokens:,}); put the "
                "former files back, give the new ones a name of their own in data.data_path, or set "
                "data.allow_changed_data: true to read them from their first epoch on, whatever of them was read before"
            )


def _refuse_trained(config: Config, folder: Path, reads: Sequence[Read]) -> None:
    """Those that are trained on from now on ``find_validation_sets`` refuses."""
    for name, path in config.data.valid.items():
        file = order_of(config, (path,)).files[0]
        if then := next((old for read in reads for old in read.order.files if old.same(file)), None):
            raise CheckpointError(
                f"checkpoint {folder} was trained on {then.prefix}, which is data.valid.{name} now ({file.prefix}), so "
                "that validation would measure what was trained on; name other text, or set "
                "data.allow_validation_leak: true to go on all the same"
            )


def _with_samples(ledger: Ledger, files: Sequence[DataFile], begins: Begins) -> Ledger:
    """``ledger`` with the sizes of epochs that earlier versions did not record, as far as the files are known."""

    def sized(order: DataOrder, file: DataFile) -> DataFile:
        there = next((one for one in files if file.same(one) or begins(file, one)), None)
        if file.samples or there is None:
            return file
        lengths = sequence_lengths(there.prefix)[: file.documents]
        return replace(file, samples=order.parts(lengths)[0].samples)

    def one(span: Span) -> Span:
        sizes = tuple(sized(span.order, file) for file in span.order.files)
        return replace(span, order=replace(span.order, files=sizes))

    return Ledger(tuple(one(span) for span in ledger.spans))


def ledger_at(saved: dict[str, Any], ours: Ledger, data: DataStart) -> Ledger:
    """The ledger of a run with ``ours`` that goes back to the checkpoint whose state is ``saved``."""
    if DATA_STATE not in saved:
        return ours
    files = [file for order in data.orders.values() for file in order.files]
    return _with_samples(ledger_from_json(saved[DATA_STATE]), files, data.begins)


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


def _ledger(folder: Path, saved: dict[str, Any]) -> tuple[Ledger | None, str]:
    """What the checkpoint has read, and what is not certain of it; None where nothing can be told."""
    if DATA_STATE in saved:
        try:
            return ledger_from_json(saved[DATA_STATE]), ""
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {folder}: {error}") from error
    try:
        order = order_of(read_config(folder))
    except SGTError as error:
        return None, f"it does not say what it has read, and its files cannot be looked at ({error})"
    return Ledger((Span(0, order),)), "the checkpoint does not say what its files held: taken as they are now"


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
