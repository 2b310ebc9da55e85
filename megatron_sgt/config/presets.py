"""What ``--preset`` does to a configuration file; and the paper's method, its baselines and ablations by name.

These change only the growth section, so runs from one file see the same data in the same order and start from the same
weights. Presets of models that become deeper or wider are in stages/presets.py, as is the table of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_sgt.errors import ConfigError

Values = dict[str, Any]
Preset = Callable[[Mapping[str, Any]], Values]
"""From the nested values of a file, overridden by the command line, to values that lie over those of the file."""


OFF: Values = {"block_loop_layers": [], "replay": None, "options": None}
"""Resets what a file may have set for another method."""


def _grow(**choices: Any) -> Callable[[int], Values]:
    values = {**OFF, "method": "sgt", "head_choice": "highest", "direction": "deep_to_shallow", **choices}
    return lambda num_layers: values


def _block_loop(count: int) -> Callable[[int], Values]:
    """``count`` layers in the middle of the model, executed twice."""

    def values(num_layers: int) -> Values:
        if count > num_layers:
            raise ConfigError(f"preset block-loop-{count} needs {count} layers, the model has {num_layers}")
        first = (num_layers - count + 1) // 2
        layers = list(range(first, first + count))
        return {**OFF, "method": "block_loop", "block_loop_layers": layers, "block_loop_count": 1}

    return values


BASELINES: dict[str, Callable[[int], Values]] = {
    "vanilla": lambda num_layers: {**OFF, "method": "vanilla"},
    "sgt": _grow(),
    "sgt-lowest-heads": _grow(head_choice="lowest"),
    "sgt-random-heads": _grow(head_choice="random"),
    "sgt-all-heads": _grow(head_choice="all"),
    "sgt-shallow-first": _grow(direction="shallow_to_deep"),
    "block-loop-1": _block_loop(1),
    "block-loop-3": _block_loop(3),
}
"""Name -> the growth section's values for a number of layers."""


def baseline(name: str) -> Preset:
    """The preset ``name`` of BASELINES."""

    def values(file: Mapping[str, Any]) -> Values:
        num_layers = section(file, "model").get("num_layers")
        # A model without layers is refused later, together with all other problems.
        growth = BASELINES[name](num_layers if isinstance(num_layers, int) else 1 << 30)
        return {"growth": growth, **own_folder(name, file)}

    return values


def own_folder(name: str, file: Mapping[str, Any]) -> Values:
    """A run folder with the preset's name appended, so that runs from one file do not share one."""
    run_dir = section(file, "logging").get("run_dir", "runs/default")
    # What is no text is refused later.
    return {"logging": {"run_dir": f"{run_dir}-{name}"}} if isinstance(run_dir, str) else {}


def section(file: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of nested values; empty where it is missing, or no section, which is refused later."""
    found = file.get(name)
    return found if isinstance(found, Mapping) else {}
