"""Loads a checkpoint that has passed the checks of checkpoint/find.py."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.forms import IMPORTED_FROM, LAYOUT_FREE, read_state
from megatron_sgt.checkpoint.identity import load_file
from megatron_sgt.checkpoint.place import Place
from megatron_sgt.checkpoint.reshard.engine_state import load_into_engine
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader, is_layout_free
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, WEIGHTS
from megatron_sgt.checkpoint.reshard.sibling import layout_free_copy
from megatron_sgt.checkpoint.save import layout_of
from megatron_sgt.checkpoint.shard_files import ShardFiles, redirected_to
from megatron_sgt.checkpoint.surgery.reader import GrownReader, Opened, WeightsReader, open_any
from megatron_sgt.checkpoint.surgery.state import grown_hooks, stage_of
from megatron_sgt.compat.quiet import quiet_logs
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError, DamagedCheckpointError, first_line
from megatron_sgt.optim.ema import WeightAverage
from megatron_sgt.parallel.collectives import gather_or_raise
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.rng import load_rng_state, seed_for_training

if TYPE_CHECKING:
    import deepspeed

_OF_OTHER_FILES = (
    OSError, RuntimeError, AssertionError, AttributeError, LookupError, TypeError, ValueError, DamagedCheckpointError,
)  # fmt: skip
"""What DeepSpeed raises where a file is not what it has written."""


def verify_together(folder: Path, config: Config, groups: ParallelGroups) -> str | None:
    """What is wrong with the bytes of ``folder``, None if nothing; collective, each rank reads a part.

    With ``checkpoint.verify: sizes`` a few pieces of every file are read (``files.sample_of``).

    Raises:
        CheckpointError: a rank cannot see the folder.
    """
    few = config.checkpoint.verify == "sizes"
    if few and groups.is_main and manifest.without_samples(folder):
        print(
            f"VERIFY  {folder}: an older version saved it, so that checkpoint.verify=sizes cannot see a file that was "
            "swapped for another of the same size; checkpoint.verify=checksums can",
            flush=True,
        )
    look = manifest.sample_problems if few else manifest.checksum_problems
    found = gather_or_raise(lambda: look(folder, groups.rank, groups.world_size), groups)
    try:
        manifest.refuse(folder, list(dict.fromkeys(problem for part in found for problem in part)))
    except CheckpointError as error:
        return str(error)
    return None


def load_checkpoint(
    folder: Path,
    state: dict[str, Any],
    config: Config,
    engine: deepspeed.DeepSpeedEngine,
    groups: ParallelGroups,
    average: WeightAverage | None = None,
) -> str | None:
    """Load weights, optimizer and random streams of this rank from a checked ``folder``; collective.

    Under the same layout DeepSpeed reads its own files and everything continues bit for bit. Under another layout a
    layout-free copy is made beside it, once, and read. ``state``: what ``check_checkpoint`` returned for ``folder``.
    ``average``: of the weights; it starts from the loaded weights where the checkpoint holds none.

    Returns:
        One line for the log about another layout; None for the same.

    Raises:
        CheckpointError: the files cannot be read or converted.
    """
    here = layout_of(config, groups)
    if state["layout"] == here:
        kept = average if layout.AVERAGE_STATE in state else None
        _continue_exactly(_load_shards(folder, here, engine, groups, kept), folder, groups)
        if average is not None and kept is None:
            average.start()
        return None
    if is_layout_free(state):
        copy, how = folder, "read from its layout-free form"
    else:
        copy, how = layout_free_copy(folder, groups)
    opened: list[tuple[dict[str, Any], LayoutFreeReader, dict[str, Any] | None]] = []
    # What one rank finds damaged ends the attempt on all, before any weight is changed.
    gather_or_raise(lambda: opened.append(_open_layout_free(copy, groups)), groups)
    made, reader, streams = opened[0]
    load_into_engine(reader, made["optimizer_step"], made["loss_scale"], config, engine, groups, average)
    _restore_counters(engine, state["trainer"])
    if IMPORTED_FROM in made:
        return f"{folder.name}: a model imported from {made[IMPORTED_FROM]}, without optimizer state"
    note = "random streams continue"
    if streams is None:
        note = _restart_streams(state["trainer"]["step"], config, groups)
    else:
        _continue_exactly(streams, copy, groups)
    return f"{folder.name}: {_changes(made['source_layout'], here)}; {how}; {note}"


def grown_state(state: dict[str, Any], place: Place) -> tuple[dict[str, Any], list[str]]:
    """The state of a stage's last checkpoint as that of the next stage, and what a user should know of it.

    Raises:
        CheckpointError: the state is damaged.
        ConfigError: the schedule cannot go on in the grown model.
    """
    here = place.here
    assert here.grown is not None, "the first stage has not grown"
    name, growth = here.grown.operator.name, here.grown.growth
    hooks, notes = grown_hooks(state, name, growth, place.there.config, here.config)
    return {**state, "hooks": hooks}, notes


def load_grown(
    folder: Path,
    state: dict[str, Any],
    place: Place,
    engine: deepspeed.DeepSpeedEngine,
    groups: ParallelGroups,
    average: WeightAverage | None = None,
) -> str | None:
    """Load the last checkpoint of a stage into the ``engine`` of the next, through its growth; collective.

    Every rank reads what it needs from the files of all ranks, whatever layout they were saved under; nothing is
    written. The process that has saved them and a fresh one get the same numbers. ``state``: that of the checkpoint.

    Returns:
        One line for the log about another layout; None for the same.

    Raises:
        CheckpointError: the files cannot be read.
    """
    config = place.here.config
    opened: list[tuple[GrownReader, int, float | None, dict[str, Any] | None, dict[str, Any] | None]] = []
    gather_or_raise(lambda: opened.append(_open_grown(folder, state, place, groups)), groups)
    reader, step, scale, where, streams = opened[0]
    load_into_engine(reader, step, scale, config, engine, groups, average)
    _restore_counters(engine, state["trainer"])
    note = "random streams continue"
    if streams is None:
        note = _restart_streams(state["trainer"]["step"], config, groups)
    else:
        _continue_exactly(streams, folder, groups)
    here = layout_of(config, groups)
    if where == here:
        return None
    return f"{folder.name}: {_changes(where or {}, here)}; read as it grows; {note}"


def load_weights(
    folder: Path,
    wanted: str,
    config: Config,
    engine: deepspeed.DeepSpeedEngine,
    groups: ParallelGroups,
    average: WeightAverage | None = None,
) -> None:
    """Give an ``engine`` that has trained nothing the weights of the checkpoint ``folder``, of any form; collective.

    Every rank reads what it needs from the files of all ranks of exactly this folder, whatever ``latest`` names
    (DeepSpeed's own loading without optimizer states takes the newest weights at ZeRO-3), and nothing is written beside
    them, as they are another run's. The optimizer, its step, the loss scale and the random streams stay a new run's.

    Args:
        wanted: "model", or "ema": the moving average of the weights.
        average: of the weights of this run; it starts from those that are loaded.

    Raises:
        CheckpointError: the files cannot be read.
    """
    opened: list[Opened] = []
    gather_or_raise(lambda: opened.append(open_any(folder)), groups)
    reader = WeightsReader(opened[0].tensors, AVERAGE if wanted == "ema" else WEIGHTS)
    load_into_engine(reader, 0, None, config, engine, groups, average)


def _open_grown(
    folder: Path, state: dict[str, Any], place: Place, groups: ParallelGroups
) -> tuple[GrownReader, int, float | None, dict[str, Any] | None, dict[str, Any] | None]:
    """A reader, AdamW's step, the loss scale, the layout that it was saved under, this rank's random streams."""
    config, grown = place.here.config, place.here.grown
    assert grown is not None
    opened = open_any(folder)
    carried = grown.carried(opened.step, config)
    made_of = grown.settings.weights
    reader = GrownReader(opened.tensors, grown.growth, carried, config.train.seed, stage_of(state) + 1, made_of)
    where = opened.source_layout
    return reader, carried.step, opened.loss_scale, where, _streams_of(folder, where, groups)


def _streams_of(folder: Path, where: dict[str, Any] | None, groups: ParallelGroups) -> dict[str, Any] | None:
    """This rank's random streams, where the same ranks have saved them."""
    if where is None:
        return None
    ranks = where["tensor_model_parallel_size"], where["data_parallel_size"], where.get(layout.PIPELINE_SIZE, 1)
    return _read_streams(folder, groups) if ranks == (groups.tp_size, groups.dp_size, groups.pp_size) else None


def _open_layout_free(
    copy: Path, groups: ParallelGroups
) -> tuple[dict[str, Any], LayoutFreeReader, dict[str, Any] | None]:
    """What ``copy`` was made from, its reader, and this rank's random streams where the same ranks have saved them."""
    made = read_state(copy)[LAYOUT_FREE]
    where = None if IMPORTED_FROM in made else made["source_layout"]
    return made, LayoutFreeReader(copy), _streams_of(copy, where, groups)


def _load_shards(
    folder: Path,
    where: dict[str, Any],
    engine: deepspeed.DeepSpeedEngine,
    groups: ParallelGroups,
    average: WeightAverage | None,
) -> dict[str, Any]:
    """Let DeepSpeed read its own files, and ``average`` its own; returns this rank's random streams.

    Learning rate, weight decay and constants stay this run's. All files are read before any weight is changed.
    """
    settings = [
        {name: value for name, value in group.items() if name not in ("params", "step")}
        for group in engine.optimizer.param_groups
    ]
    files = ShardFiles()
    paths = [folder / name for name in layout.files_of_rank(where, groups.mp_rank, groups.dp_rank)]
    averaged = folder / layout.average_file(where, groups.mp_rank, groups.dp_rank)
    gather_or_raise(lambda: files.read(paths if average is None else [*paths, averaged]), groups)
    if average is not None:
        gather_or_raise(partial(_restore, average, files, averaged), groups)
    streams: dict[str, Any] = {}
    gather_or_raise(lambda: streams.update(_read_streams(folder, groups)), groups)
    try:
        with quiet_logs(), redirected_to(files, engine):
            path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    except _OF_OTHER_FILES as error:  # no DamagedCheckpointError: weights may have been touched
        raise CheckpointError(f"checkpoint {folder} cannot be loaded: {error}") from error
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder}")
    for group, ours in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(ours)
    return streams


def _restore(average: WeightAverage, files: ShardFiles, path: Path) -> None:
    try:
        average.load_state_dict(files.load(str(path)))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DamagedCheckpointError(f"{path} holds no average of this run's weights: {first_line(error)}") from error


def _restore_counters(engine: deepspeed.DeepSpeedEngine, trainer: dict[str, int]) -> None:
    """Set DeepSpeed's own counters, which it reports and saves, to where the run stands."""
    engine.global_steps = trainer["step"] + trainer["skipped_steps"]
    engine.global_samples = trainer["consumed_samples"]
    engine.skipped_steps = trainer["skipped_steps"]


def _restart_streams(step: int, config: Config, groups: ParallelGroups) -> str:
    """Start new random streams, for ranks that are not those of the checkpoint; says so."""
    digest = hashlib.sha256(f"{config.train.seed}/{step}".encode()).digest()
    seed_for_training(int.from_bytes(digest[:4], "big"), groups)
    return f"random streams restart from seed {config.train.seed}, step {step} and rank"


def _read_streams(folder: Path, groups: ParallelGroups) -> dict[str, Any]:
    return load_file(folder / layout.rng_file(groups.rank), mapped=False)


def _continue_exactly(streams: dict[str, Any], folder: Path, groups: ParallelGroups) -> None:
    try:
        load_rng_state(streams, groups.device)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        path = folder / layout.rng_file(groups.rank)
        raise CheckpointError(f"{path} holds no random streams: {first_line(error)}; copy it again") from error


def _changes(there: dict[str, Any], here: dict[str, Any]) -> str:
    there, here = _told(there), _told(here)
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if layout.PIPELINE_COUNTS not in there or layout.PIPELINE_COUNTS not in here:  # the number of stages says it
        names = [name for name in names if name != layout.PIPELINE_COUNTS]
    changes = (f"{name} {there.get(name, 'none')} -> {here.get(name, 'none')}" for name in names)
    return ", ".join(changes) or "same layout"


def _told(where: dict[str, Any]) -> dict[str, Any]:
    """A layout for people: one stage of a pipeline is named too, the layers of stages are separated by commas."""
    counts = where.get(layout.PIPELINE_COUNTS)
    told = {**where, layout.PIPELINE_SIZE: where.get(layout.PIPELINE_SIZE, 1)}
    return told | ({} if counts is None else {layout.PIPELINE_COUNTS: ",".join(map(str, counts))})
