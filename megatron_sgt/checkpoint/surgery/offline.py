"""Writes a grown checkpoint, with the configuration that trains it on: all of it, or nothing.

    <output>/config.yaml             pretrain_sgt.py --config <output>/config.yaml goes on from here
    <output>/global_stepN/           layout-free
    <output>/passed_data.json        if the run skips data
    <output>/run/                    what that run will write

Everything is made in <output>.tmp, whose last step is its name.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.forms import HELD, LAYOUT_FREE, STAGE
from megatron_sgt.checkpoint.reshard.convert import KEPT, write_tensors
from megatron_sgt.checkpoint.reshard.rank_state import WEIGHTS
from megatron_sgt.checkpoint.save import growth_fingerprint
from megatron_sgt.checkpoint.shard_files import as_checkpoint_error
from megatron_sgt.checkpoint.surgery.reader import GrownReader, MergedTensors, Opened, open_any
from megatron_sgt.checkpoint.surgery.state import grown_hooks, stage_of
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.files import commit, fresh_folder, nearest, temporary_of, write_text
from megatron_sgt.lease import Lease, beside, held
from megatron_sgt.metrics.units import file_size
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.stages.config import grown_config
from megatron_sgt.stages.growth import Growth, Operator
from megatron_sgt.stages.maps import has_new_entries, maps_of
from megatron_sgt.stages.optimizer import Carried, OptimizerPolicy, carry

RUN_FILE = "config.yaml"
_FP32 = 4
_HEADER = """\
# Trains on the model that {operator} has made of {source}; written by tools/grow_checkpoint.py.
"""


@dataclass(frozen=True)
class GrownCheckpoint:
    """What ``grow_checkpoint`` has written. ``notes``: what a user should know, one line each."""

    folder: Path
    config_file: Path
    config: Config
    growth: Growth
    carried: Carried
    stage: int
    num_bytes: int
    notes: tuple[str, ...]


def grow_checkpoint(
    load: Path,
    output: Path,
    operator: Operator,
    options: dict[str, Any],
    moments: str | None = None,
    optimizer: str | None = None,
    seed: int | None = None,
    made_of: str = WEIGHTS,
) -> GrownCheckpoint:
    """Grow the checkpoint ``load`` (a folder of checkpoints, or one of them) into the folder ``output``.

    Args:
        options: of ``operator``.
        moments, optimizer: what becomes of AdamW's moments and step (optimizer.py); None: the operator's choice.
        seed: of new entries; None: train.seed.
        made_of: what becomes the new weights: WEIGHTS, or their AVERAGE.

    Raises:
        CheckpointError: the checkpoint cannot be read or holds no average, ``output`` exists or cannot be written.
        ConfigError: the options do not fit the model, or the grown model not the run.
    """
    if output.exists():
        raise CheckpointError(f"{output} exists already; choose another folder, or delete it")
    source = layout.resolve(load)
    manifest.verify_checksums(source)
    opened = open_any(source)
    _refuse_replay(opened.config)
    growth = operator(opened.config.model, options)
    config = grown_config(opened.config, growth, opened.saved["trainer"]["step"])
    policy = OptimizerPolicy.parse(optimizer or operator.optimizer)
    carried = carry(opened.step, policy, moments or operator.moments, config.optim, has_new_entries(maps_of(growth)))
    hooks, notes = grown_hooks(opened.saved, operator.name, growth, opened.config, config)
    stage = stage_of(opened.saved) + 1
    seed = config.train.seed if seed is None else seed
    reader = GrownReader(opened.tensors, growth, carried, seed, stage, made_of)
    _check_room(output, parameter_count(growth.new) * _FP32 * len(reader.quantities))
    made: dict[str, Any] = {
        **opened.saved.get(LAYOUT_FREE, {"version": 1, "source_layout": opened.source_layout}),
        "optimizer_step": carried.step,
        "loss_scale": opened.loss_scale,
        HELD: list(reader.quantities),
        STAGE: stage,
    }
    # The stages of a run that has grown are history: the grown model is the first of a run of its own.
    kept = {name: value for name, value in opened.saved.items() if name != layout.STAGES_STATE}
    state = {**kept, "hooks": hooks, "layout": None, LAYOUT_FREE: made}
    config = _moved(config, output)
    tag = layout.tag_for(opened.saved["trainer"]["step"])
    with _whole_or_nothing(output) as temporary:
        layout.carry_passed_data(source.parent, temporary)
        inner = temporary_of(temporary / tag)
        fresh_folder(inner)
        write_tensors(inner, reader.parameters(), reader.quantities, reader.whole)
        num_bytes = _commit(opened, config, state, inner, temporary / tag)
        header = _HEADER.format(operator=operator.name, source=source)
        write_text(temporary / RUN_FILE, header + config.to_yaml())
        layout.point_to(temporary, tag)
    notes += _remarks(opened)
    return GrownCheckpoint(output / tag, output / RUN_FILE, config, growth, carried, stage, num_bytes, tuple(notes))


def _moved(config: Config, output: Path) -> Config:
    """A run in ``output`` that starts from the checkpoint there."""
    places = {"load": str(output), "save": None, "resume": "auto"}
    checkpoint = config.checkpoint.model_copy(update=places)
    logging = config.logging.model_copy(update={"run_dir": str(output / "run")})
    return config.model_copy(update={"checkpoint": checkpoint, "logging": logging})


def _refuse_replay(config: Config) -> None:
    if config.growth.replay is not None:
        raise ConfigError(
            f"growth.replay: {config.growth.replay} names layers of the recorded model, which grows in a run "
            "with growth.stages alone; a checkpoint of such a run cannot grow here"
        )


def _check_room(output: Path, size: int) -> None:
    free = shutil.disk_usage(nearest(output.parent)).free
    if free < size:
        raise CheckpointError(
            f"the grown checkpoint takes about {file_size(size)}, but {output.parent} has {file_size(free)} free; make "
            "room, or choose another folder"
        )


def _commit(opened: Opened, config: Config, state: dict[str, Any], temporary: Path, final: Path) -> int:
    """Complete the checkpoint's folder; returns its size in bytes."""
    layout.write_json(temporary / layout.STATE_FILE, state)
    write_text(temporary / layout.CONFIG_FILE, config.to_yaml())
    for file in sorted(opened.folder.glob("rng_rank_*.pt")):  # for a load at the same number of ranks
        shutil.copyfile(file, temporary / file.name)
    kept = {name: value for name, value in manifest.read_manifest(opened.folder).items() if name in KEPT}
    changed = {
        "layout": None,
        "growth": growth_fingerprint(state),
        "config_sha256": hashlib.sha256(config.to_yaml().encode()).hexdigest(),
    }
    return manifest.commit_folder(temporary, final, {**kept, **changed})


@contextmanager
def _whole_or_nothing(output: Path) -> Iterator[Path]:
    """A folder to write into, renamed to ``output`` at the end; after an error nothing is left."""
    temporary = temporary_of(output)
    lease = Lease(beside(output), "a growth", "choose another --output", output)
    with as_checkpoint_error(f"{output} cannot be written: "), held(lease):
        if output.exists():  # by one that has just ended
            raise CheckpointError(f"{output} exists already; choose another folder, or delete it")
        try:
            fresh_folder(temporary)
            yield temporary
            lease.check()
            commit(temporary, output)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _remarks(opened: Opened) -> list[str]:
    notes = []
    for name in ("train_iters", "exit_interval"):
        last = getattr(opened.config.train, name)
        if last is not None and opened.saved["trainer"]["step"] >= last:
            notes.append(f"the run had reached its last step, {last:,}: set train.{name} to go on")
    if isinstance(opened.tensors, MergedTensors) and opened.tensors.drift:
        notes.append(
            f"tensor-parallel copies of replicated weights differed by {opened.tensors.drift:.1e}, rank 0's were taken"
        )
    return notes
