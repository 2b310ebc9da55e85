"""The saved states of hooks after growth."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.checkpoint.surgery.state import grown_hooks, stage_of
from megatron_sgt.errors import CheckpointError
from megatron_sgt.planning.structure import schedule_of
from megatron_sgt.stages.config import grown_config
from megatron_sgt.stages.operators import OPERATORS
from tests.helpers.checkpoints import GROWN_STEP, grown_schedule
from tests.helpers.checkpoints import grown_config as looping_config


def saved() -> dict[str, Any]:
    """Layer 3 loops twice, layer 1 is in its window."""
    events = [{"step": 2, "action": "first_selection"}]
    hooks = {"growth": {"schedule": grown_schedule(looping_config()), "events": events}, "spike": {"losses": [1.0]}}
    return {"trainer": {"step": GROWN_STEP}, "hooks": hooks}


def grow(name: str, options: dict[str, Any], state: dict[str, Any] | None = None) -> tuple[dict[str, Any], list[str]]:
    old = looping_config()
    growth = OPERATORS[name](old.model, options)
    hooks, notes = grown_hooks(state or saved(), name, growth, old, grown_config(old, growth, 5))
    if "growth" in hooks:
        schedule = schedule_of(grown_config(old, growth, 5))
        schedule.load_state_dict(hooks["growth"]["schedule"])
        hooks["plan"] = schedule.plan
    return hooks, notes


@pytest.mark.parametrize(
    ("name", "options", "looping"),
    [("g_stack", {"factor": 2}, [5, 7]), ("midas", {"block_size": 2}, [1, 5]), ("msg", {"num_layers": 6}, [1, 3])],
)
def test_loops_go_to_their_heirs(name: str, options: dict[str, Any], looping: list[int]) -> None:
    before = saved()
    hooks, _ = grow(name, options, before)
    assert [layer for layer, _ in hooks["plan"].layers] == looping
    assert hooks["plan"][looping[1]].kept_heads == (0, 3) and hooks["plan"][looping[1]].loops == 2
    *old, event = hooks["growth"]["events"]
    assert old == before["hooks"]["growth"]["events"] and event["action"] == "grow"
    assert (event["step"], event["operator"], event["layers"]) == (
        GROWN_STEP,
        name,
        list(range(4)) * 2,
    ) or name != "g_stack"
    assert stage_of(before) == 0 and stage_of({**before, "hooks": hooks}) == 1
    assert before == saved(), "left as it was"


def test_losses_are_forgotten_where_they_will_jump() -> None:
    assert grow("g_stack", {"factor": 2})[0]["spike"] == {}
    assert grow("msg", {"num_layers": 6})[0]["spike"] == {"losses": [1.0]}


def test_copies_out_of_reach_are_told() -> None:
    _, notes = grow("msg", {"num_layers": 6})
    assert notes == ["layers [4, 5] are deeper than 1, the shallowest that loops, so that none is ever selected"]


def test_a_model_without_a_history_and_a_damaged_one() -> None:
    imported = {"trainer": {"step": 0}, "hooks": {}, "layout_free": {"stage": 2}}
    assert grow("g_stack", {}, imported) == ({}, []) and stage_of(imported) == 2
    damaged = saved()
    del damaged["hooks"]["growth"]["events"]
    with pytest.raises(CheckpointError, match="growth state is damaged"):
        grow("g_stack", {}, damaged)
