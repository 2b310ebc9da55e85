"""How many weights a model has, by part and on a tensor-parallel rank; bytes of a checkpoint."""

from __future__ import annotations

from typing import get_args

from megatron_sgt.arch.weight import Part
from megatron_sgt.arch.weights import weights
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig

ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def parameter_count(model: ModelConfig, tp_size: int = 1) -> int:
    """Number of weights on one of ``tp_size`` tensor-parallel ranks (default: of the whole model)."""
    return sum(weight.on_rank(tp_size) for weight in weights(model))


def parameters_by_part(model: ModelConfig) -> dict[Part, int]:
    """Number of weights of the whole model by part; parts that the model has not are left out."""
    totals: dict[Part, int] = dict.fromkeys(get_args(Part), 0)
    for weight in weights(model):
        totals[weight.part] += weight.elements
    return {part: total for part, total in totals.items() if total}


def checkpoint_bytes(config: Config, precision: str) -> int:
    """Bytes of one checkpoint: weights, AdamW's moments, and the fp32 copy and average of them where there are such.

    (As under ZeRO, though fp32 on one data-parallel rank has no such copy: ``Config.zero_stage_on``.)
    """
    copied = precision != "fp32" or config.parallel.zero_stage > 0
    in_fp32 = 2 + copied + bool(config.train.ema_decay)
    per_parameter = ELEMENT_BYTES[precision] + in_fp32 * ELEMENT_BYTES["fp32"]
    return parameter_count(config.model) * per_parameter
