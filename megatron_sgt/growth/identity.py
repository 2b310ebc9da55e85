"""Whether a saved growth state belongs to a run.

A schedule continues exactly only under the rule and the settings that it began with: others would change decisions
silently, so a difference is refused and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError, DamagedCheckpointError

_MONITORING = frozenset({"growth.entropy_after_fixed"})
"""Fields that change what is watched, never what is decided: they may differ between save and load."""
_NO_RULE = frozenset({"growth.ramp"})
"""No part of the rule: checkpoint/find.py compares that of config.yaml, while it fades something in."""


def check_identity(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Compare the state of a checkpoint with ``Schedule.identity()`` of this run.

    Raises:
        CheckpointError: names each differing field with the checkpoint's and the run's value.
        DamagedCheckpointError: the state says nothing of them.
    """
    try:
        saved = _fields(state)
    except (KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpointError(f"growth state is damaged: {type(error).__name__}: {error}") from error
    # A field that is younger than the checkpoint had its default then.
    younger = {f"growth.{name}": value for name, value in GrowthConfig().model_dump(mode="json").items()}
    saved, here = {**younger, **saved}, _fields(mine)
    missing = object()
    differing = [
        f"{name} (checkpoint {_show(saved, name)}, run {_show(here, name)})"
        for name in here | saved
        if name not in _MONITORING | _NO_RULE and saved.get(name, missing) != here.get(name, missing)
    ]
    if differing:
        raise CheckpointError(
            f"the checkpoint's growth does not fit this run: {'; '.join(differing)}. Use the settings it was "
            "saved with, or start a new run"
        )


def _fields(identity: Mapping[str, Any]) -> dict[str, Any]:
    config = identity["config"]
    return {
        # Before there were others, the rule was the built-in one of the configuration.
        "growth rule": identity.get("rule", config["method"]),
        "version of the growth rule": identity.get("rule_version", 1),
        "num_layers": identity["num_layers"],
        "num_heads": identity["num_heads"],
        **{f"growth.{name}": value for name, value in config.items()},
    }


def _show(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "absent"
    text = repr(values[name])
    return text if len(text) <= 200 else f"{text[:200]}..."
