"""Which run a saved growth state belongs to.

A schedule continues exactly only under the settings that it began with: other settings would change
decisions silently, so a difference is refused and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError

_MONITORING = frozenset({"entropy_after_fixed"})
"""Fields that change what is watched, never what is decided: they may differ between save and load."""


def identity(config: GrowthConfig, num_layers: int, num_heads: int) -> dict[str, Any]:
    """The part of a state_dict that says which run it belongs to. JSON-able."""
    return {"num_layers": num_layers, "num_heads": num_heads, "config": config.model_dump(mode="json")}


def check_identity(state: Mapping[str, Any], config: GrowthConfig, num_layers: int, num_heads: int) -> None:
    """Raises CheckpointError naming each differing field with the checkpoint's and the run's value."""
    try:
        saved = {"num_layers": state["num_layers"], "num_heads": state["num_heads"]}
        saved |= {f"growth.{name}": value for name, value in state["config"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"growth state is damaged: {type(error).__name__}: {error}") from error
    mine: dict[str, Any] = {"num_layers": num_layers, "num_heads": num_heads}
    mine |= {f"growth.{name}": value for name, value in config.model_dump(mode="json").items()}
    # A field that is younger than the checkpoint had its default then.
    younger = {f"growth.{name}": value for name, value in GrowthConfig().model_dump(mode="json").items()}
    saved = {**younger, **saved}
    watched = [name for name in mine | saved if name.removeprefix("growth.") not in _MONITORING]
    missing = object()
    differing = [
        f"{name} (checkpoint {_show(saved, name)}, run {_show(mine, name)})"
        for name in watched
        if saved.get(name, missing) != mine.get(name, missing)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint's growth does not fit this run: {'; '.join(differing)}. Use the settings it was "
            "saved with, or start a new run"
        )


def _show(values: Mapping[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"
