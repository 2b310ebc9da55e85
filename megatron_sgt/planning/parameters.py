"""How many weights a model has, by part, on a tensor-parallel rank and on a pipeline stage; bytes of a checkpoint."""

from __future__ import annotations

from functools import lru_cache
from typing import get_args

from megatron_sgt.arch.weight import ELEMENT_BYTES, Part, Weight
from megatron_sgt.arch.weights import stage_of, weights
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig


def parameter_count(model: ModelConfig, tp_size: int = 1) -> int:
    """Number of weights on one of ``tp_size`` tensor-parallel ranks (default: of the whole model)."""
    return sum(weight.on_rank(tp_size) for weight in weights(model))


def stage_parameter_count(config: Config, stage: int, tp_size: int = 1) -> int:
    """The same of pipeline stage ``stage``, without a weight that it borrows."""
    from megatron_sgt.planning.pipeline import pipeline_layout  # needs NumPy, which a login node has not

    layout = pipeline_layout(config)
    by_layer, others = _by_layer(config.model, tp_size)
    outside = sum(weight.on_rank(tp_size) for weight in others if stage_of(weight, layout) == stage)
    return outside + sum(by_layer[layer] for layer in layout.layers(stage))


def borrowed_count(config: Config, stage: int) -> int:
    """Number of weights that one rank of ``stage`` borrows: embeddings that are tied, on the last of several stages."""
    stages = config.parallel.pipeline_model_parallel_size
    if stages == 1 or stage != stages - 1 or config.model.untie_embeddings_and_output_weights:
        return 0
    rows = config.model.padded_vocab_size() // config.parallel.tensor_model_parallel_size
    return rows * config.model.hidden_size


@lru_cache(maxsize=64)
def _by_layer(model: ModelConfig, tp_size: int) -> tuple[tuple[int, ...], tuple[Weight, ...]]:
    """(weights of each layer on a rank, the weights outside of the layers)."""
    sizes = [0] * model.num_layers
    for weight in weights(model):
        if weight.layer is not None:
            sizes[weight.layer] += weight.on_rank(tp_size)
    return tuple(sizes), tuple(weight for weight in weights(model) if weight.layer is None)


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
