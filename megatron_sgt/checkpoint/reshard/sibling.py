"""The layout-free copy that a run makes of a checkpoint when it loads it under another layout."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.reshard.convert import commit, write_part
from megatron_sgt.checkpoint.reshard.source import open_source
from megatron_sgt.errors import CheckpointError
from megatron_sgt.files import fresh_folder, temporary_of
from megatron_sgt.lease import Lease, beside
from megatron_sgt.metrics.units import elapsed, file_size
from megatron_sgt.parallel.collectives import gather_or_raise, on_rank_zero
from megatron_sgt.parallel.groups import ParallelGroups


def sibling_of(folder: Path) -> Path:
    """Where the layout-free copy of the checkpoint ``folder`` lies."""
    return folder.with_name(folder.name + layout.COPY_SUFFIX)


def remove_sibling(folder: Path) -> None:
    """Delete the layout-free copy of a checkpoint that is replaced or deleted."""
    copy = sibling_of(folder)
    if copy.exists():
        layout.remove(copy)


def layout_free_copy(folder: Path, groups: ParallelGroups) -> tuple[Path, str]:
    """The layout-free copy of ``folder``, made if needed, and a phrase on its origin; collective, all ranks write.

    Raises:
        CheckpointError: on every rank, when one of them could not write its part.
        LeaseError: on every rank, when another run is making it.
    """
    copy = sibling_of(folder)
    if on_rank_zero(lambda: _is_whole(copy, folder)):
        return copy, f"read from {copy}"
    # It lies beside the checkpoint, which may be another run's, and more than one may start from.
    lease = Lease(beside(copy), "a run that converts it", "convert it once with tools/reshard_checkpoint.py", copy)
    try:
        return _make_copy(folder, copy, lease, groups)
    finally:
        lease.release()


def _make_copy(folder: Path, copy: Path, lease: Lease, groups: ParallelGroups) -> tuple[Path, str]:
    start = time.perf_counter()
    temporary = temporary_of(copy)
    gather_or_raise(lambda: _make_room(folder, copy, temporary, lease) if groups.is_main else None, groups)
    source = open_source(folder)
    drift = max(gather_or_raise(lambda: write_part(source, temporary, groups.rank, groups.world_size), groups))
    size = gather_or_raise(lambda: commit(source, temporary, copy) if groups.is_main else 0, groups)[0]
    text = f"converted into {copy} ({file_size(size)} in {elapsed(time.perf_counter() - start)})"
    if drift:
        text += f"; tensor-parallel copies of replicated weights differed by {drift:.1e}, rank 0's were taken"
    return copy, text


def _is_whole(copy: Path, folder: Path) -> bool:
    """Whether ``copy`` is a copy of ``folder``, and whole. Older versions noted no origin."""
    if not copy.exists():
        return False
    try:
        manifest.refuse(copy, manifest.sample_problems(copy))
        origin = manifest.read_manifest(copy).get("source")
        if origin is not None and origin != manifest.digest(manifest.read_manifest(folder)):
            raise CheckpointError(f"{copy} was made of another checkpoint")
    except CheckpointError:
        return False
    return True


def _make_room(folder: Path, copy: Path, temporary: Path, lease: Lease) -> None:
    """Hold the place of the copy, and clear it of what is no whole one."""
    try:
        lease.take()
        if copy.exists():
            shutil.rmtree(copy, ignore_errors=True)
        fresh_folder(temporary)
    except OSError as error:
        raise CheckpointError(
            f"{folder} was written under another layout and no copy can be made beside it ({error}); run "
            f"tools/reshard_checkpoint.py --load {folder} --output DIR and set checkpoint.load to DIR"
        ) from error
