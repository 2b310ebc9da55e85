"""Loading: check first, touch weights afterwards."""

from __future__ import annotations

import hashlib
import logging
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.reshard.engine_state import load_into_engine
from megatron_sgt.checkpoint.reshard.layout_free import LAYOUT_FREE, LayoutFreeReader, is_layout_free
from megatron_sgt.checkpoint.reshard.sibling import layout_free_copy
from megatron_sgt.checkpoint.save import layout_of
from megatron_sgt.config import Config, load_config
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import load_rng_state, seed_for_training

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
        CheckpointError: checkpoint.load holds no whole checkpoint, ``latest`` points nowhere, or the run would
            leave checkpoints of another run beside its own.
    """
    own = config.save_dir
    if config.checkpoint.resume == "auto" and (tag := layout.latest_tag(own)) is not None:
        return own / tag, f"resuming from {own / tag}"
    if config.checkpoint.load is not None:
        folder = layout.resolve(Path(config.checkpoint.load))
        _refuse_mixture(own, layout.step_of(folder.name))
        return folder, f"starting from {folder} (checkpoint.load)"
    _refuse_mixture(own, 0)
    return None, f"fresh start: no checkpoint in {own}"


def _refuse_mixture(own: Path, step: int) -> None:
    """Two runs in one folder would delete each other's checkpoints, and resume from the wrong one."""
    later = [tag for tag in layout.finished_tags(own) if layout.step_of(tag) > step]
    if later:
        raise CheckpointError(
            f"checkpoint.resume is never, but {own} holds checkpoints of another run: {', '.join(later)}. "
            "Choose another logging.run_dir or checkpoint.save, move them away, or set checkpoint.resume: auto "
            "to continue from the newest"
        )


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


def load_checkpoint(
    folder: Path,
    state: dict[str, Any],
    config: Config,
    engine: deepspeed.DeepSpeedEngine,
    groups: ParallelGroups,
) -> str | None:
    """Load weights, optimizer and random streams of this rank from a checked ``folder``; collective.

    Under the layout that it was written under, DeepSpeed reads its own files and everything continues bit for
    bit. Under another one a layout-free copy is made beside it, once, and read.

    Args:
        state: what ``check_checkpoint`` returned for ``folder``.

    Returns:
        One line for the log about another layout; None for the same.

    Raises:
        CheckpointError: the files cannot be read or converted.
    """
    here = layout_of(config, groups)
    if state["layout"] == here:
        _load_shards(folder, engine)
        load_rng_state(_read_streams(folder, groups), groups.device)
        return None
    if is_layout_free(state):
        copy, how = folder, "read from its layout-free form"
    else:
        copy, how = layout_free_copy(folder, groups)
    made = layout.read_json(copy / layout.STATE_FILE)[LAYOUT_FREE]
    load_into_engine(
        LayoutFreeReader(copy), made["optimizer_step"], made["loss_scale"], config.model, engine, groups
    )
    _restore_counters(engine, state["trainer"])
    streams = _continue_streams(copy, made["source_layout"], state["trainer"]["step"], config, groups)
    return f"{folder.name}: {_changes(made['source_layout'], here)}; {how}; {streams}"


def _load_shards(folder: Path, engine: deepspeed.DeepSpeedEngine) -> None:
    """Let DeepSpeed read its own files. Learning rate, weight decay and constants stay this run's."""
    settings = [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in engine.optimizer.param_groups
    ]
    logging.disable(logging.WARNING)
    try:
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except (OSError, RuntimeError, AssertionError, KeyError, ValueError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be loaded: {error}") from error
    finally:
        logging.disable(logging.NOTSET)
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder}")
    for group, ours in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(ours)


def _restore_counters(engine: deepspeed.DeepSpeedEngine, trainer: dict[str, int]) -> None:
    """Give DeepSpeed's own counters, which it reports and saves, the values that the run has reached."""
    engine.global_steps = trainer["step"] + trainer["skipped_steps"]
    engine.global_samples = trainer["consumed_samples"]
    engine.skipped_steps = trainer["skipped_steps"]


def _continue_streams(
    copy: Path, source: dict[str, Any], step: int, config: Config, groups: ParallelGroups
) -> str:
    """Restore this rank's random streams where it existed before, else start new ones; says which."""
    same_ranks = source["tensor_model_parallel_size"] == groups.tp_size
    if same_ranks and source["data_parallel_size"] == groups.dp_size:
        load_rng_state(_read_streams(copy, groups), groups.device)
        return "random streams continue"
    digest = hashlib.sha256(f"{config.train.seed}/{step}".encode()).digest()
    seed_for_training(int.from_bytes(digest[:4], "big"), groups)
    return f"random streams start anew from seed {config.train.seed}, step {step} and rank"


def _read_streams(folder: Path, groups: ParallelGroups) -> dict[str, Any]:
    path = folder / layout.rng_file(groups.rank)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _changes(there: dict[str, Any], here: dict[str, Any]) -> str:
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)} -> {here.get(name)}" for name in names) or "same layout"
