"""What the metrics say of a model that has grown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.checkpoint.layout import DATA_STATE, GROWTH_STATE
from megatron_sgt.checkpoint.place import Place
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.data.ledger import recorded_tokens
from megatron_sgt.growth import Schedule
from megatron_sgt.metrics.records import GrowRecord
from megatron_sgt.planning.flops import at_length, step_flops
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.structure import schedule_of
from megatron_sgt.stages.growth import sizes_of


def grow_record(
    place: Place,
    saved: Mapping[str, Any],
    schedule: Schedule,
    notes: Sequence[str],
    losses: tuple[float | None, float],
    seconds: float,
    pairs: AttendedPairs | None = None,
) -> GrowRecord:
    """The record of the growth at ``place``.

    Args:
        saved: the state of the checkpoint that was loaded.
        schedule: of the new model.
        losses: of the probe, before and after.
        pairs: of the data, which FLOPs count.
    """
    stage, trainer = place.here, saved["trainer"]
    assert stage.grown is not None, "the first stage has not grown"
    growth, told = stage.grown.growth, stage.record()
    before = _schedule_of(place.there.config, saved)
    event = schedule.event(trainer["step"], "grow").to_dict()
    seq_length = stage.config.seq_lengths.at(trainer["step"] + 1)
    return {
        "step": trainer["step"],
        "stage": stage.index,
        "operator": told["operator"],
        "options": told["options"],
        "moments": told["moments"],
        "optimizer": told["optimizer"],
        "lr_policy": told["lr_policy"],
        "weights": told["weights"],
        "preserves": growth.preserves,
        "layers": list(growth.layers),
        "heirs": list(growth.heirs),
        "loop_depth": event["loop_depth"],
        "kept_heads": event["kept_heads"],
        "notes": list(notes),
        "sizes_before": sizes_of(growth.old),
        "sizes_after": sizes_of(growth.new),
        "parameters_before": parameter_count(growth.old),
        "parameters_after": parameter_count(growth.new),
        "flops_per_token_before": _flops_per_token(at_length(growth.old, seq_length), before, pairs),
        "flops_per_token_after": _flops_per_token(at_length(growth.new, seq_length), schedule, pairs),
        "probe_loss_before": losses[0],
        "probe_loss_after": losses[1],
        "consumed_samples": trainer["consumed_samples"],
        "consumed_tokens": recorded_tokens(
            saved.get(DATA_STATE), trainer["consumed_samples"], stage.config.model.seq_length
        ),
        "seconds": seconds,
    }


def _schedule_of(config: Config, saved: Mapping[str, Any]) -> Schedule:
    schedule = schedule_of(config)
    schedule.load_state_dict(saved["hooks"][GROWTH_STATE]["schedule"])
    return schedule


def _flops_per_token(model: ModelConfig, schedule: Schedule, pairs: AttendedPairs | None) -> float:
    return step_flops(model, schedule.plan, 1, pairs=pairs).model / model.seq_length
