"""The one translation from this project's configuration to DeepSpeed's JSON."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError

_NEVER = 2**31 - 1
_WHOLE_LAYERS = {"leaf_module": {"classes": ["megatron_sgt.model.layer.SGTLayer"]}}
"""ZeRO-3 fetches and frees the weights of one transformer layer together.

Its order of fetches then never changes when growth changes what happens inside a layer, and a layer costs one
gather and one pair of hooks instead of a dozen.
"""


def deepspeed_config(config: Config, world_size: int, precision: str) -> dict[str, Any]:
    """DeepSpeed's configuration dictionary.

    Args:
        world_size: ranks of the run, from which the accumulation follows.
        precision: "fp32", "bf16" or "fp16", resolved for the device.

    The ``deepspeed:`` section of the configuration is merged on top; values that contradict a typed section
    were refused when the configuration was validated, and "auto" stands for the value derived here.
    """
    stage = config.zero_stage_on(world_size, precision)
    summed, reduced = config.grad_dtypes(precision)
    derived: dict[str, Any] = {
        "train_batch_size": config.train.global_batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.num_micro_batches(world_size),
        # Stage 0 is clipped in engine/step.py, where a non-finite gradient can be caught as well.
        "gradient_clipping": 0.0 if stage == 0 else config.optim.clip_grad,
        # Each gradient joins its sum and is freed as soon as it is there, where DeepSpeed offers the choice (ZeRO-1).
        "bf16": {"enabled": precision == "bf16", "immediate_grad_update": True},
        "fp16": {"enabled": precision == "fp16"},
        "data_types": {"grad_accum_dtype": summed},
        "communication_data_type": reduced,
        "zero_optimization": {"stage": stage, **_zero_options(stage, reduced != precision)},
        "zero_allow_untested_optimizer": True,
        # Else DeepSpeed takes no optimizer but its own, which it compiles when the run starts, for offload.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        # It waits for the device twice per micro-batch; throughput is measured by engine/loop.py, once per step.
        "timers": {"throughput": {"enabled": False}},
    }
    return _merge(derived, config.deepspeed)


def _zero_options(stage: int, widened: bool) -> dict[str, Any]:
    """What this project adds. ``widened``: gradients are reduced in a wider type than they are computed in.

    Stage 2 then takes the mean after the sum, in that type. With the option on (no reduce-scatter either, in spite of
    its name) it divides first, in the model's type: one more rounding, unless the ranks are a power of two.
    """
    if stage == 2 and widened:
        return {"reduce_scatter": False}
    return _WHOLE_LAYERS if stage == 3 else {}


def _merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(base))
    for key, value in override.items():
        if value == "auto":
            continue
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def check_deepspeed(config: Config, world_size: int, precision: str) -> None:
    """Let DeepSpeed itself check the section ``deepspeed``.

    Raises:
        ConfigError: it refuses a value.
    """
    values = deepspeed_config(config, world_size, precision)
    del values["train_batch_size"]  # DeepSpeed knows no world size yet to compare it with
    try:
        DeepSpeedConfig(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise ConfigError(f"deepspeed: refused by DeepSpeed: {'; '.join(lines)}; correct it or leave it out") from error
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"deepspeed: refused by DeepSpeed: {error}; correct it or leave it out") from error
