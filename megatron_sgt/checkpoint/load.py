"""Loading: check first, touch weights afterwards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.save import layout_of
from megatron_sgt.config import Config, load_config
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import load_rng_state

if TYPE_CHECKING:
    import deepspeed

# Model fields that may differ between the run that saved and the one that loads: they shape no weight.
_FREE_MODEL_FIELDS = {
    "seq_length",
    "attention_dropout",
    "hidden_dropout",
    "init_method_std",
    "use_cpu_initialization",
}


def find_checkpoint(config: Config) -> tuple[Path | None, str]:
    """The checkpoint that this run starts from, and one line that says so.

    ``checkpoint.resume: auto`` looks for this run's own checkpoints first; then ``checkpoint.load`` is taken,
    where finding nothing is an error.

    Raises:
        CheckpointError: checkpoint.load holds no whole checkpoint, or ``latest`` points nowhere.
    """
    own = config.save_dir
    if config.checkpoint.resume == "auto" and (tag := layout.latest_tag(own)) is not None:
        return own / tag, f"resuming from {own / tag}"
    if config.checkpoint.load is not None:
        folder = layout.resolve(Path(config.checkpoint.load))
        return folder, f"starting from {folder} (checkpoint.load)"
    return None, f"fresh start: no checkpoint in {own}"


def check_checkpoint(folder: Path, config: Config) -> dict[str, Any]:
    """Check that ``folder`` is whole and fits the model of ``config``; return its saved state.

    Needs no process group. Raises CheckpointError naming damaged files or differing fields.
    """
    layout.verify_sizes(folder)
    state = layout.read_json(folder / layout.STATE_FILE)
    try:
        saved = load_config(folder / layout.CONFIG_FILE).model.model_dump()
    except ConfigError as error:
        raise CheckpointError(f"{folder / layout.CONFIG_FILE} cannot be read: {error}") from error
    wanted = config.model.model_dump()
    differing = [
        f"model.{name} is {saved.get(name)} there and {wanted[name]} here"
        for name in wanted
        if name not in _FREE_MODEL_FIELDS and saved.get(name) != wanted[name]
    ]
    if differing:
        raise CheckpointError(f"checkpoint {folder} belongs to another model: " + "; ".join(differing))
    return state


def check_layout(folder: Path, state: dict[str, Any], config: Config, groups: ParallelGroups) -> None:
    """Raises CheckpointError when the shards were written under another parallel layout."""
    wanted = layout_of(config, groups)
    differing = [
        f"{name} {state['layout'].get(name)} there, {wanted[name]} here"
        for name in wanted
        if state["layout"].get(name) != wanted[name]
    ]
    if differing:
        raise CheckpointError(
            f"checkpoint {folder} was written under another layout ({'; '.join(differing)}); "
            "run with the layout it was written under"
        )


def load_checkpoint(
    folder: Path,
    state: dict[str, Any],
    config: Config,
    engine: deepspeed.DeepSpeedEngine,
    groups: ParallelGroups,
) -> None:
    """Load weights, optimizer and random streams of this rank from a checked ``folder``; collective.

    Args:
        state: what ``check_checkpoint`` returned for ``folder``.

    Raises:
        CheckpointError: another layout, or DeepSpeed cannot read its files.
    """
    check_layout(folder, state, config, groups)
    logging.disable(logging.WARNING)
    try:
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except (OSError, RuntimeError, AssertionError, KeyError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be loaded: {error}") from error
    finally:
        logging.disable(logging.NOTSET)
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder}")
    streams = torch.load(folder / layout.rng_file(groups.rank), map_location="cpu", weights_only=True)
    load_rng_state(streams, groups.device)
