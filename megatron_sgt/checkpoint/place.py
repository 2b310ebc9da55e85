"""Where a checkpoint lies among the stages of a run: which one has saved it, and which goes on from it. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint.find import differing_sizes
from megatron_sgt.checkpoint.layout import AVERAGE_STATE, STAGES_STATE
from megatron_sgt.config import Config
from megatron_sgt.config.base import shown
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.config.phases import RATE, phases_of
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.stages.operators import operator_named
from megatron_sgt.stages.stages import Stage, stage_after, stages_of


@dataclass(frozen=True)
class Place:
    """``there``: the stage that the checkpoint was saved in; ``here``: the one that trains the next step."""

    there: Stage
    here: Stage

    @property
    def grows(self) -> bool:
        """Whether the checkpoint is the last one of its stage, so that the model grows when it is loaded."""
        return self.here.index > self.there.index


def place_of(config: Config, folder: Path, saved: Mapping[str, Any], model: ModelConfig) -> Place:
    """The place of the checkpoint ``folder``, whose state is ``saved``, in a run of ``config``.

    Args:
        model: of the checkpoint. One of the run's first stage has no history in this run, whatever came before.

    Raises:
        CheckpointError: the run has had other stages than those of ``config``, or would have by that step; or the model
            grows from an average that the checkpoint does not hold.
        ConfigError: the stages of ``config`` are not valid.
    """
    stages, step = stages_of(config), saved["trainer"]["step"]
    records: Sequence[Mapping[str, Any]] = saved.get(STAGES_STATE, ())
    if not config.growth.stages or not differing_sizes(model, stages[0].config.model):
        records = ()
    here = stage_after(stages, step)
    problem = next(_differences(records, stages), None)
    if problem is None and here.index > len(records) + (step == here.first):
        late = stages[len(records)]
        problem = (
            f"growth.stages[{late.index}] ends at step {late.last:,}, after which the run that saved it has not grown"
        )
    if problem is not None:
        raise CheckpointError(
            f"checkpoint {folder} is at step {step:,}, and {problem}: stages that have begun cannot change. Restore "
            "growth.stages (a preset makes others at other sizes or steps: go on with the config.yaml of the run's "
            "folder, without --preset), or start a new run"
        )
    place = Place(stages[len(records)], here)
    if place.grows and here.grown is not None and here.grown.settings.weights == "ema" and AVERAGE_STATE not in saved:
        raise CheckpointError(
            f"checkpoint {folder} holds no average of the weights, from which growth.stages[{here.index - 1}] makes "
            "the next model; set its weights to weights, or start from a checkpoint that was saved with train.ema_decay"
        )
    return place


def check_past_phases(folder: Path, there: Config, here: Config, step: int) -> None:
    """Check that the phases which have begun by ``step`` are those that the run of the checkpoint ``folder`` has had.

    Args:
        there: the configuration in the checkpoint. The steps of a run without phases are compared in the same way,
            so that phases can be given to it from some step on.

    Raises:
        CheckpointError: one is another, named with what was trained and what would have been.
    """
    begun = [phase for config in (here, there) for phase in phases_of(config) if phase.first <= step]
    for phase in sorted(begun, key=lambda one: one.first):
        for of_step in (phase.first, min(phase.last, step)):
            before, now = (_settings_at(config, of_step) for config in (there, here))
            for name in before:
                if before[name] != now[name]:
                    raise CheckpointError(
                        f"checkpoint {folder} is at step {step:,}, and {phase.where} has begun: {name} of step "
                        f"{of_step:,} was {shown(before[name])} there and is {shown(now[name])} here; phases that have "
                        "begun cannot change, but for their end. End it here and add another one, or restore the "
                        "phases from the checkpoint's config.yaml"
                    )


def _settings_at(config: Config, step: int) -> dict[str, Any]:
    """What phases decide of a step, but for its data, of which the checkpoint has a record of its own."""
    model, phase = config.at_step(step).model, config.phase_at(step)
    rate = {} if phase is None else phase.settings.model_dump(include=set(RATE), exclude_none=True)
    return {
        "global_batch_size": config.batches.at(step),
        "the count of samples": config.batches.samples(step),
        "seq_length": config.seq_lengths.at(step),
        "rotary_base": model.rotary_base,
        "rotary_scaling": None if model.rotary_scaling is None else model.rotary_scaling.positions(),
        "learning rate": rate or None,
    }


def _differences(records: Sequence[Mapping[str, Any]], stages: tuple[Stage, ...]) -> Iterator[str]:
    for number, record in enumerate(records):
        where = f"growth.stages[{number}]"
        if number + 1 == len(stages):
            yield f"its model has grown {len(records)} times, but {where} is missing"
            return
        there, here = _comparable(record), _comparable(stages[number + 1].record())
        if there["step"] != here["step"]:
            yield f"{where} ended at step {there['step']:,} there and ends at step {here['step']:,} here"
        for name in there | here:
            if there.get(name) != here.get(name):
                yield f"{where}.{name} was {there.get(name)!r} there and is {here.get(name)!r} here"


def _comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """``record`` with all options of its operator, also those that were left at their defaults."""
    found = dict(record)
    try:
        operator = operator_named(found["operator"])
        found["options"] = operator.Options.model_validate(found["options"]).model_dump(mode="json")
    except (ConfigError, ValueError):  # of another version: compared as it is
        pass
    return found
