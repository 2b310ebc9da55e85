"""What is told of a growth: sizes, parameters and FLOPs of both models, loops where they are now."""

from __future__ import annotations

from typing import Any, get_type_hints

from megatron_sgt.checkpoint.place import Place
from megatron_sgt.checkpoint.surgery.state import grown_hooks
from megatron_sgt.engine.grow_record import grow_record
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.metrics.lines import grow_line
from megatron_sgt.metrics.records import GrowRecord
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.planning.structure import schedule_of
from megatron_sgt.stages.stages import stages_of
from tests.helpers.single import small_config

CONFIG = small_config(
    growth={
        "method": "block_loop",
        "block_loop_layers": [2],
        "stages": [{"until_steps": 4, "operator": "midas", "options": {"block_size": 2}, "lr_policy": "rewarm(3)"}],
    }
)


def record() -> tuple[dict[str, Any], Place]:
    first, second = stages_of(CONFIG)
    old = {"schedule": schedule_of(first.config).state_dict(), "events": []}
    saved = {"trainer": {"step": 4, "consumed_samples": 8}, "hooks": {"growth": old}}
    assert second.grown is not None
    hooks, notes = grown_hooks(saved, "midas", second.grown.growth, first.config, second.config)
    schedule = schedule_of(second.config)
    schedule.load_state_dict(hooks["growth"]["schedule"])
    place = Place(first, second)
    return dict(grow_record(place, saved, schedule, ["a note", *notes], (4.5, 4.75), 2.0)), place


def test_the_record_tells_of_both_models() -> None:
    told, place = record()
    assert set(told) | {"time"} == set(get_type_hints(GrowRecord))
    old, new = place.there.config.model, place.here.config.model
    assert (told["stage"], told["step"], told["operator"], told["options"]) == (1, 4, "midas", {"block_size": 2})
    assert told["layers"] == [0, 1, 0, 1, 2, 3] and told["heirs"] == [0, 1, 4, 5]
    assert told["sizes_before"]["num_layers"] == 4 and told["sizes_after"]["num_layers"] == 6
    assert told["parameters_before"] == parameter_count(old) and told["parameters_after"] == parameter_count(new)
    looped = LoopPlan(4, ((2, LayerPlan(block_loops=1)),)), LoopPlan(6, ((4, LayerPlan(block_loops=1)),))
    for when, model, plan in (("before", old, looped[0]), ("after", new, looped[1])):
        assert told[f"flops_per_token_{when}"] == step_flops(model, plan, 1).model / model.seq_length
    assert (told["moments"], told["optimizer"], told["lr_policy"]) == ("copy", "continue", "rewarm(3)")
    assert told["consumed_tokens"] == 8 * 32 and not told["preserves"]


def test_the_line_shows_what_has_changed() -> None:
    told, _ = record()
    line, note = grow_line(told).splitlines()
    assert line.startswith("STAGE step 4  stage 1 begins: midas  num_layers 4 -> 6  ") and note == "NOTE  a note"
    assert "loss 4.500 -> 4.750  lr rewarm(3)  (2.0 s)" in line and "hidden_size" not in line
    assert "loss 4.750  lr" in grow_line({**told, "probe_loss_before": None})
