"""The configuration of the run that trains a grown model on. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_sgt.config import Config, parse_config
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.growth import Growth


def grown_config(config: Config, growth: Growth, step: int) -> Config:
    """``config`` with the model that has grown after ``step`` steps; what names layers names all copies of them.

    Raises:
        ConfigError: the grown model does not fit the rest of the configuration, or is still being faded in.
    """
    if config.growth.ramp is not None and step < config.growth.ramp.end:
        raise ConfigError(
            f"the model is faded in until step {config.growth.ramp.end:,} and cannot grow again after step {step:,}; "
            "grow later, or choose fewer ramp_steps before"
        )
    values: dict[str, Any] = config.model_dump()
    values["model"] = growth.new.model_dump()
    values["growth"] |= {
        name: _copies(growth, getattr(config.growth, name)) for name in ("exclude_layers", "block_loop_layers")
    }
    values["growth"]["ramp"] = None if growth.ramp is None else {"first": step, **asdict(growth.ramp)}
    if config.train.recompute_layers is not None:
        values["train"]["recompute_layers"] = _copies(growth, config.train.recompute_layers)
    try:
        return parse_config(values, source="the grown model")
    except ConfigError as error:
        raise ConfigError("; ".join(line.strip() for line in str(error).splitlines())) from None


def _copies(growth: Growth, layers: Sequence[int]) -> tuple[int, ...]:
    copies = growth.copies_of_layer
    return tuple(sorted(new for layer in layers for new in copies[layer]))
