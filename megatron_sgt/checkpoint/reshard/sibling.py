"""The layout-free copy that a run makes of a checkpoint when it loads it under another layout."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.reshard.convert import commit, fresh_folder, write_part
from megatron_sgt.checkpoint.reshard.source import open_source
from megatron_sgt.errors import CheckpointError
from megatron_sgt.parallel.collectives import broadcast_object
from megatron_sgt.parallel.groups import ParallelGroups

SUFFIX = ".universal"


def sibling_of(folder: Path) -> Path:
    """Where the layout-free copy of the checkpoint ``folder`` lies."""
    return folder.with_name(folder.name + SUFFIX)


def remove_sibling(folder: Path) -> None:
    """Delete the layout-free copy of a checkpoint that is replaced or deleted."""
    copy = sibling_of(folder)
    if copy.exists():
        layout.remove(copy)


def layout_free_copy(folder: Path, groups: ParallelGroups) -> tuple[Path, str]:
    """The layout-free copy of ``folder``, made now if there is none; collective, each rank writes a part.

    Returns:
        The copy's folder, and a phrase for the log that says where it comes from.

    Raises:
        CheckpointError: on every rank, when one of them could not write its part.
    """
    copy = sibling_of(folder)
    if broadcast_object(groups.is_main and _is_whole(copy), groups):
        return copy, f"read from {copy}"
    start = time.perf_counter()
    temporary = copy.with_name(copy.name + ".tmp")
    _agreed(lambda: _make_room(folder, temporary) if groups.is_main else None, groups)
    source = open_source(folder)
    drift = max(_agreed(lambda: write_part(source, temporary, groups.rank, groups.world_size), groups))
    size = _agreed(lambda: commit(source, temporary, copy) if groups.is_main else 0, groups)[0]
    text = f"converted into {copy} ({size / 1e6:,.1f} MB in {time.perf_counter() - start:.1f} s)"
    if drift:
        text += f"; tensor-parallel copies of replicated weights differed by {drift:.1e}, rank 0's were taken"
    return copy, text


def _is_whole(copy: Path) -> bool:
    """Whether the copy can be used; a damaged one is cleared away."""
    if not copy.exists():
        return False
    try:
        layout.verify_sizes(copy)
    except CheckpointError:
        shutil.rmtree(copy, ignore_errors=True)
        return False
    return True


def _make_room(folder: Path, temporary: Path) -> None:
    try:
        fresh_folder(temporary)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder} was written under another layout and no copy can be made beside it ({error}); run "
            f"tools/reshard_checkpoint.py --load {folder} --output DIR and set checkpoint.load to DIR"
        ) from error


def _agreed(action: Callable[[], Any], groups: ParallelGroups) -> list[Any]:
    """The results of ``action`` by rank; an error of one rank is raised on all, so that none waits for it."""
    result, problem = None, None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    outcomes: list[Any] = [(result, problem)] * groups.world_size
    if groups.world_size > 1:
        dist.all_gather_object(outcomes, (result, problem))
    for _, told in outcomes:
        if told is not None:
            raise CheckpointError(told)
    return [value for value, _ in outcomes]
