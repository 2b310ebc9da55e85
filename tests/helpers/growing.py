"""Growing models in memory, without a checkpoint: their weights as a dict under Hugging Face names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint.reshard.rank_state import WEIGHTS
from megatron_sgt.checkpoint.surgery.reader import GrownReader
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.stages.growth import Growth
from megatron_sgt.stages.optimizer import Carried
from tests.helpers.reference_sgt import forward

SHAPE: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "kv_channels": 6, "ffn_hidden_size": 20,
    "seq_length": 12, "vocab_size": 29, "make_vocab_size_divisible_by": 1, "init_method_std": 0.3,
    "layernorm_epsilon": 1e-3,
}  # fmt: skip
"""A small model with weights and an epsilon so large that every mistake is seen."""
WEIGHTS_ONLY = Carried(0, "fresh")
Params = dict[str, Tensor]


def shape(**changes: Any) -> ModelConfig:
    """SHAPE with ``changes``."""
    return ModelConfig.model_validate({**SHAPE, **changes})


def random_params(model: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> Params:
    """Weights off their initial values: norms off 1, biases off 0."""
    generator = torch.Generator().manual_seed(seed)
    params: Params = {}
    for weight in weights(model):
        for name, size in weight.whole.items():
            noise = torch.randn(size, generator=generator, dtype=dtype)
            params[name] = 1 + 0.2 * noise if weight.kind == "norm" else 0.3 * noise
    return params


class InMemory:
    """Whole tensors by quantity and Hugging Face name, as a reader of a checkpoint gives them."""

    def __init__(self, state: dict[str, Params]) -> None:
        self.state = state
        self.quantities = tuple(state)

    def whole(self, weight: Weight, quantity: str) -> Params:
        return {name: self.state[quantity][name] for name in weight.hf}


def grown(growth: Growth, params: Params, quantity: str = WEIGHTS, carried: Carried = WEIGHTS_ONLY) -> Params:
    """All tensors of the new model."""
    state = dict.fromkeys({WEIGHTS, "exp_avg", "exp_avg_sq"}, params)
    reader = GrownReader(InMemory(state), growth, carried, seed=5, stage=1)
    return {name: t for weight in weights(growth.new) for name, t in reader.whole(weight, quantity).items()}


def logits(params: Params, model: ModelConfig, tokens: Tensor | None = None) -> Tensor:
    """By the reference, which knows RMSNorm and SwiGLU."""
    settings = {
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
    }
    gates = torch.ones(model.num_layers, model.num_attention_heads)
    if tokens is None:
        tokens = torch.arange(2 * model.seq_length).view(2, -1) * 7 % (model.vocab_size or 1)
    return forward(params, tokens, settings, [0] * model.num_layers, gates, {})[0]


def gap(one: Params, other: Params) -> float:
    """Largest absolute difference over tensors of the same names and shapes."""
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one), [n for n in one if one[n].shape != other[n].shape]
    return max(float((one[name] - other[name]).abs().max()) for name in one)
