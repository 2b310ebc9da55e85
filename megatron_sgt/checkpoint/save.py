"""Saving: every rank writes its part under a temporary name, then one rank commits the whole."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.reshard.deepspeed_info import UNIVERSAL_INFO, universal_info
from megatron_sgt.checkpoint.reshard.sibling import remove_sibling
from megatron_sgt.checkpoint.reshard.stage0 import PARAMETER_NAMES
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.parallel.collectives import barrier
from megatron_sgt.parallel.device import resolve_precision
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import rng_state

if TYPE_CHECKING:
    import deepspeed


# Stands in the RuntimeError with which torch.save reports a full disk.
_TORCH_WRITER = "inline_container"

# DeepSpeed options on which the order or the grouping of the numbers in its files depends.
_SHARD_OPTIONS = {
    "zero_optimization": (
        "sub_group_size",
        "round_robin_gradients",
        "parameter_alignment",
        "elastic_checkpoint",
    ),
    "data_types": ("grad_accum_dtype",),
}


def layout_of(config: Config, groups: ParallelGroups) -> dict[str, Any]:
    """All that DeepSpeed's files of a checkpoint depend on: they are read as they are under the same only."""
    shape = {
        "tensor_model_parallel_size": groups.tp_size,
        "data_parallel_size": groups.dp_size,
        "zero_stage": config.parallel.zero_stage,
        "precision": resolve_precision(config.train.precision, groups.device),
        "weight_decay_on": config.optim.weight_decay_on,
    }
    options = {
        f"deepspeed.{section}.{name}": config.deepspeed[section][name]
        for section, names in _SHARD_OPTIONS.items()
        for name in names
        if name in config.deepspeed.get(section, {})
    }
    return shape | options


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

    Raises:
        CheckpointError: this rank cannot write (disk full, quota, permissions).
    """
    tag = layout.tag_for(step)
    temporary = root / f"{tag}.tmp"
    with _explained(root / tag, temporary):
        if groups.is_main:
            if temporary.exists():  # of a save that was killed, perhaps with more ranks than this run has
                shutil.rmtree(temporary)
            temporary.mkdir(parents=True)
    barrier(groups)
    with _explained(root / tag, temporary):
        _write_shards(temporary, config, engine, groups)
    barrier(groups)
    size = 0
    with _explained(root / tag, temporary):
        if groups.is_main:
            size = _commit(root, tag, temporary, {**state, "layout": layout_of(config, groups)}, config)
    barrier(groups)
    return root / tag, size


@contextmanager
def _explained(final: Path, temporary: Path) -> Iterator[None]:
    """Turn a failure to write into a CheckpointError, and free the disk from what was written so far."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, OSError) and _TORCH_WRITER not in str(error):
            raise
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), repr(error))
        raise CheckpointError(
            f"cannot write checkpoint {final}: {reason}; earlier checkpoints are untouched. Make room, or set "
            "checkpoint.save to another place, and start again: the run goes on from the newest one"
        ) from error


def _write_shards(
    temporary: Path, config: Config, engine: deepspeed.DeepSpeedEngine, groups: ParallelGroups
) -> None:
    """Write this rank's files into ``temporary``."""
    root, tag = str(temporary.parent), temporary.name
    logging.disable(logging.WARNING)  # DeepSpeed reports every file on every rank
    try:
        engine.save_checkpoint(root, tag=tag, client_state=_client_state(config, engine), save_latest=False)
    finally:
        logging.disable(logging.NOTSET)
    torch.save(rng_state(groups.device), temporary / layout.rng_file(groups.rank))


def _client_state(config: Config, engine: deepspeed.DeepSpeedEngine) -> dict[str, Any]:
    """What the readers of DeepSpeed's files must know beside their content."""
    state: dict[str, Any] = {UNIVERSAL_INFO: universal_info(config.model)}
    if engine.zero_optimization_stage() == 0:
        names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        groups = engine.optimizer.param_groups
        state[PARAMETER_NAMES] = [names[id(p)] for group in groups for p in group["params"]]
    return state


def _commit(root: Path, tag: str, temporary: Path, state: dict[str, Any], config: Config) -> int:
    layout.write_json(temporary / layout.STATE_FILE, state)
    (temporary / layout.CONFIG_FILE).write_text(config.to_yaml())
    files = layout.file_sizes(temporary)
    layout.write_json(temporary / layout.MANIFEST_FILE, {"tag": tag, "files": files})
    final = root / tag
    if final.exists():  # the same step again, after a resume from an older checkpoint
        remove_sibling(final)
        layout.remove(final)
    temporary.rename(final)
    layout.replace_text(root / layout.LATEST_FILE, tag)
    for pruned in layout.prune(root, config.checkpoint.keep_last):
        remove_sibling(root / pruned)
    return sum(files.values())
