"""Writes a checkpoint layout-free: whole tensors under Hugging Face names, one kind of file per quantity.

The parameters are divided into consecutive parts of about equal size, which any number of processes can write in
parallel. One parameter is in memory at a time: a process needs about four times the largest parameter in fp32 (the
shards of all tensor-parallel ranks, the merged tensor, one copy of it), independent of the model's size.
"""

from __future__ import annotations

import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.forms import LAYOUT_FREE
from megatron_sgt.checkpoint.reshard.layout_free import file_name
from megatron_sgt.checkpoint.reshard.source import Source, open_source
from megatron_sgt.checkpoint.reshard.tensor_file import TensorFileWriter
from megatron_sgt.checkpoint.shard_files import as_checkpoint_error
from megatron_sgt.compat.quiet import quiet_imports
from megatron_sgt.errors import CheckpointError
from megatron_sgt.files import fresh_folder, temporary_of
from megatron_sgt.lease import Lease, inside

KEPT = ("step", "tokens", "growth", "config_sha256", "tokenizer", "code", "run", "origin")
"""Entries of a manifest that hold under any layout."""


def weights_of(source: Source, part: int, parts: int) -> list[Weight]:
    """The consecutive weights that are part ``part`` (from 0) of ``parts``; may be none."""
    table = weights(source.model)
    sizes = [weight.on_rank(source.tp_size) for weight in table]
    chosen, before = [], 0
    for weight, size in zip(table, sizes, strict=True):
        if (before + size / 2) * parts // sum(sizes) == part:
            chosen.append(weight)
        before += size
    return chosen


def write_part(source: Source, destination: Path, part: int = 0, parts: int = 1) -> float:
    """Write one part of ``source`` into the folder ``destination``.

    Returns:
        The largest difference between tensor-parallel copies of a replicated weight; rank 0's is taken.

    Raises:
        CheckpointError: the files cannot be written.
    """
    chosen = weights_of(source, part, parts)
    drifts = [0.0]

    def merged(weight: Weight, quantity: str) -> dict[str, Tensor]:
        tensors, drift = source.whole(weight, quantity)
        drifts.append(drift)
        return tensors

    if chosen:
        write_tensors(destination, chosen, source.quantities, merged, part, parts)
    return max(drifts)


def write_tensors(
    destination: Path,
    chosen: Sequence[Weight],
    quantities: Sequence[str],
    whole: Callable[[Weight, str], dict[str, Tensor]],
    part: int = 0,
    parts: int = 1,
) -> None:
    """Write the files of one part, into which ``whole`` gives one parameter's tensors of a quantity at a time.

    Raises:
        CheckpointError: the files cannot be written.
    """
    shapes = {name: shape for weight in chosen for name, shape in weight.whole.items()}
    with as_checkpoint_error(f"{destination} cannot be written: "), ExitStack() as stack:
        writers = {
            quantity: stack.enter_context(TensorFileWriter(destination / file_name(quantity, part, parts), shapes))
            for quantity in quantities
        }
        for weight in chosen:
            for quantity, writer in writers.items():
                tensors = whole(weight, quantity)
                while tensors:  # each is freed before the next parameter is read
                    name = next(iter(tensors))
                    writer.append(name, tensors.pop(name))


def commit(source: Source, temporary: Path, final: Path) -> int:
    """Complete the folder ``temporary``, all of whose parts are written, and rename it; returns its size in bytes.

    Raises:
        CheckpointError: the files cannot be written.
    """
    state = {
        **source.saved,
        "layout": None,
        LAYOUT_FREE: {
            "version": 1,
            "source_layout": source.saved["layout"],
            "optimizer_step": source.step,
            "loss_scale": source.loss_scale,
        },
    }
    made_from = manifest.read_manifest(source.folder)
    about = {name: value for name, value in made_from.items() if name in KEPT}
    about["source"] = manifest.digest(made_from)
    with as_checkpoint_error(f"{final} cannot be written: "):
        layout.write_json(temporary / layout.STATE_FILE, state)
        # The random streams, for a load that changes the ZeRO stage alone.
        for file in [source.folder / layout.CONFIG_FILE, *sorted(source.folder.glob("rng_rank_*.pt"))]:
            shutil.copyfile(file, temporary / file.name)
        layout.carry_passed_data(source.folder.parent, final.parent)
        return manifest.commit_folder(temporary, final, {**about, "layout": None})


def convert(folder: Path, root: Path, processes: int = 1) -> tuple[Path, int, float]:
    """Convert the checkpoint ``folder`` into a checkpoint of the same tag below ``root``.

    Args:
        processes: how many write at the same time, each its own part.

    Returns:
        The new checkpoint's folder, its size in bytes, and what ``write_part`` returns.

    Raises:
        CheckpointError: ``folder`` is damaged or cannot be converted, or ``root`` has such a checkpoint.
        LeaseError: a run or another command writes into ``root``.
    """
    manifest.verify_checksums(folder)
    source = open_source(folder)
    tag = layout.tag_for(source.saved["trainer"]["step"])
    final = root / tag
    if final.exists():
        raise CheckpointError(f"{final} exists already; choose another folder, or delete it")
    temporary = temporary_of(final)
    lease = Lease(inside(root), "a conversion", "choose another --output")
    with as_checkpoint_error(f"{temporary} cannot be made: "):
        lease.take()
    try:
        with as_checkpoint_error(f"{temporary} cannot be made: "):
            fresh_folder(temporary)
        drift = _write_parts(source, folder, temporary, processes)
        lease.check()
        size = commit(source, temporary, final)
        lease.check()
        layout.point_to(root, tag)
    finally:
        lease.release()
    return final, size, drift


def _write_parts(source: Source, folder: Path, temporary: Path, processes: int) -> float:
    if processes == 1:
        return write_part(source, temporary)
    # Not forked: a fork would lose the threads that the libraries have started.
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, fresh, quiet_imports) as pool:
        return max(pool.map(partial(_convert_part, folder, temporary, processes), range(processes)))


def _convert_part(folder: Path, destination: Path, parts: int, part: int) -> float:
    return write_part(open_source(folder), destination, part, parts)
