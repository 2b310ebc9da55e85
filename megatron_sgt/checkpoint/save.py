"""Saving: every rank writes its part under a temporary name, then one rank commits the whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.config import Config
from megatron_sgt.parallel.collectives import barrier
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import rng_state

if TYPE_CHECKING:
    import deepspeed


def layout_of(config: Config, groups: ParallelGroups) -> dict[str, int]:
    """The layout that the shards of a checkpoint belong to."""
    return {
        "tensor_model_parallel_size": groups.tp_size,
        "data_parallel_size": groups.dp_size,
        "zero_stage": config.parallel.zero_stage,
    }


def save_checkpoint(
    root: Path,
    step: int,
    state: dict[str, Any],
    config: Config,
    engine: deepspeed.DeepSpeedEngine,
    groups: ParallelGroups,
) -> tuple[Path, int]:
    """Save after ``step`` optimizer steps; collective over all ranks.

    ``latest`` changes only after every rank's files are complete, so that a run killed at any moment of a
    save resumes from the previous checkpoint. (DeepSpeed writes ``latest`` before the other ranks have
    finished; its own is not used.)

    Args:
        state: JSON-able state of the trainer and its hooks.

    Returns:
        The committed folder and its size in bytes.
    """
    tag = layout.tag_for(step)
    temporary = root / f"{tag}.tmp"
    if groups.is_main:
        temporary.mkdir(parents=True, exist_ok=True)
    barrier(groups)
    logging.disable(logging.WARNING)  # DeepSpeed reports every file on every rank
    try:
        engine.save_checkpoint(str(root), tag=temporary.name, client_state={}, save_latest=False)
    finally:
        logging.disable(logging.NOTSET)
    torch.save(rng_state(groups.device), temporary / layout.rng_file(groups.rank))
    barrier(groups)
    size = 0
    if groups.is_main:
        size = _commit(root, tag, temporary, {**state, "layout": layout_of(config, groups)}, config)
    barrier(groups)
    return root / tag, size


def _commit(root: Path, tag: str, temporary: Path, state: dict[str, Any], config: Config) -> int:
    layout.write_json(temporary / layout.STATE_FILE, state)
    (temporary / layout.CONFIG_FILE).write_text(config.to_yaml())
    files = layout.file_sizes(temporary)
    layout.write_json(temporary / layout.MANIFEST_FILE, {"tag": tag, "files": files})
    final = root / tag
    if final.exists():  # the same step again, after a resume from an older checkpoint
        layout.remove(final)
    temporary.rename(final)
    layout.replace_text(root / layout.LATEST_FILE, tag)
    layout.prune(root, config.checkpoint.keep_last)
    return sum(files.values())
