"""Model variants that the tests of the model run through, and moving weights into the reference."""

from typing import Any

import torch
from torch import Tensor

from megatron_sgt.config import Config
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.model.hf_weights import hf_weights
from tests.helpers.reference_sgt import Params, Settings

# Every one with RMSNorm and SwiGLU, which is what the reference knows.
ATTENTION_VARIANTS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped_query": {"num_query_groups": 2},
    "multi_query": {"num_query_groups": 1},
    "qk_norm": {"qk_layernorm": True, "num_query_groups": 2},
    "biases": {"add_bias_linear": True},
    "qkv_bias": {"add_qkv_bias": True, "num_query_groups": 2},
    "wide_heads_tied": {"kv_channels": 24, "untie_embeddings_and_output_weights": False},
}
MODEL_VARIANTS: dict[str, dict[str, Any]] = {
    **ATTENTION_VARIANTS,
    "output_norms": {"norm_position": "output", "add_bias_linear": True},
    "olmo2": {"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all", "num_query_groups": 2},
}
"""With those whose loops have no fused form."""


def make_weights_uneven(model: torch.nn.Module, seed: int = 0) -> None:
    """Norms off 1, biases off 0, and matrices large enough that every head and every loop matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if parameter.dim() >= 2:
                parameter.add_(noise, alpha=0.1)
            else:
                parameter.copy_((0.0 if name.endswith("bias") else 1.0) + 0.2 * noise)


def hf_of(model: LanguageModel, config: Config, grads: bool = False) -> Params:
    """The model's weights, or the gradients in their places, under Hugging Face names."""
    named = dict(model.gpt.named_parameters())
    tensors = {name: p.grad if grads else p.detach() for name, p in named.items()}
    if missing := [name for name, tensor in tensors.items() if tensor is None]:
        raise ValueError(f"no gradient reached {missing}")
    return hf_weights([tensors], config.model)


def leaves(params: Params) -> Params:
    """Copies that collect gradients."""
    return {name: tensor.clone().requires_grad_() for name, tensor in params.items()}


def reference_settings(config: Config) -> Settings:
    """What the reference's forward must be told of the model."""
    model = config.model
    return {
        "num_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
    }


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest absolute difference over tensors of the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
