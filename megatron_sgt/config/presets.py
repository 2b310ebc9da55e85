"""The paper's method, its baselines and its ablations by name, which ``--preset`` applies to a configuration file.

A preset changes only the growth section, so runs from one file see the same data in the same order and start from
the same weights. Its name is appended to ``logging.run_dir``, so they do not share a folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from megatron_sgt.errors import ConfigError

Values = dict[str, Any]


_OFF: Values = {"block_loop_layers": [], "replay": None, "options": None}
"""Resets what a file may have set for another method."""


def _grow(**choices: Any) -> Callable[[int], Values]:
    values = {**_OFF, "method": "sgt", "head_choice": "highest", "direction": "deep_to_shallow", **choices}
    return lambda num_layers: values


def _block_loop(count: int) -> Callable[[int], Values]:
    """``count`` layers in the middle of the model, executed twice."""

    def values(num_layers: int) -> Values:
        if count > num_layers:
            raise ConfigError(f"preset block-loop-{count} needs {count} layers, the model has {num_layers}")
        first = (num_layers - count + 1) // 2
        layers = list(range(first, first + count))
        return {**_OFF, "method": "block_loop", "block_loop_layers": layers, "block_loop_count": 1}

    return values


PRESETS: dict[str, Callable[[int], Values]] = {
    "vanilla": lambda num_layers: {**_OFF, "method": "vanilla"},
    "sgt": _grow(),
    "sgt-lowest-heads": _grow(head_choice="lowest"),
    "sgt-random-heads": _grow(head_choice="random"),
    "sgt-all-heads": _grow(head_choice="all"),
    "sgt-shallow-first": _grow(direction="shallow_to_deep"),
    "block-loop-1": _block_loop(1),
    "block-loop-3": _block_loop(3),
}
"""Name -> the growth section's values for a number of layers."""


def preset_values(name: str, values: Mapping[str, Any]) -> Values:
    """The values by which preset ``name`` overrides ``values``, the nested values of a configuration file.

    Raises:
        ConfigError: the name is unknown, or the model too small.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ConfigError(f"--preset {name}: choose one of {', '.join(PRESETS)}{hint}")
    model, logging = (values.get(section) or {} for section in ("model", "logging"))
    num_layers = model.get("num_layers")
    # A model without layers is refused later, together with all other problems.
    growth = PRESETS[name](num_layers if isinstance(num_layers, int) else 1 << 30)
    run_dir = logging.get("run_dir", "runs/default")
    if not isinstance(run_dir, str):  # refused later
        return {"growth": growth}
    return {"growth": growth, "logging": {"run_dir": f"{run_dir}-{name}"}}
