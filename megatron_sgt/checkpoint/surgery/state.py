"""The saved state of a run (sgt_state.json) as that of the run that trains a grown model on. No torch."""

from __future__ import annotations

from typing import Any

from megatron_sgt.checkpoint.forms import LAYOUT_FREE, STAGE
from megatron_sgt.checkpoint.layout import GROWTH_STATE
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.growth.inherit import Inheritance
from megatron_sgt.planning.structure import schedule_of
from megatron_sgt.stages.growth import Growth, sizes_of

GROW = "grow"
"""Action of the event that growth of the model leaves among those of the schedule."""
SPIKE_STATE = "spike"


def stage_of(saved: dict[str, Any]) -> int:
    """How often the model of the saved state has grown."""
    hooks = saved.get("hooks", {}).get(GROWTH_STATE, {})
    events = sum(event.get("action") == GROW for event in hooks.get("events", ()))
    return max(events, saved.get(LAYOUT_FREE, {}).get(STAGE, 0))


def grown_hooks(
    saved: dict[str, Any], operator: str, growth: Growth, old: Config, new: Config
) -> tuple[dict[str, Any], list[str]]:
    """The states of the hooks, and what a user should know of them, one line each.

    Looping layers are handed to their heirs, an event tells of the growth, and the losses that spikes are judged by
    are forgotten where the loss will jump.

    Raises:
        CheckpointError: the state is damaged.
        ConfigError: the schedule cannot go on in the grown model.
    """
    hooks, notes = dict(saved.get("hooks", {})), list[str]()
    if GROWTH_STATE in hooks:
        before, after = schedule_of(old), schedule_of(new)
        try:
            schedule, events = hooks[GROWTH_STATE]["schedule"], list(hooks[GROWTH_STATE]["events"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the checkpoint's growth state is damaged: {error!r}") from error
        before.load_state_dict(schedule)
        notes = after.inherit(before, Inheritance(growth.layers, growth.heirs, growth.heads))
        event = after.event(saved["trainer"]["step"], GROW).to_dict()
        told = {"operator": operator, "layers": list(growth.layers)}
        sizes = {"sizes_before": sizes_of(growth.old), "sizes_after": sizes_of(growth.new)}
        events.append(event | told | sizes)
        hooks[GROWTH_STATE] = {"schedule": after.state_dict(), "events": events}
    if not growth.preserves and SPIKE_STATE in hooks:
        hooks[SPIKE_STATE] = {}
    return hooks, notes
