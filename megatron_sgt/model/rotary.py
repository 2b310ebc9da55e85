"""Frequencies of scaled rotary positions (``model.rotary_scaling``), by transformers' own formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sgt.config.model import ModelConfig


def scaled_frequencies(model: ModelConfig) -> tuple[Tensor | None, float]:
    """Radians per token [H / 2] fp32, on the CPU, and the attention factor, by which cos and sin are multiplied.

    (None, 1.0) without ``rotary_scaling``: then they are Megatron-Core's own.
    """
    scaling = model.rotary_scaling
    if scaling is None:
        return None, 1.0
    from transformers import LlamaConfig  # takes a second
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    original = scaling.original_max_position_embeddings or model.seq_length
    config = LlamaConfig(
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        head_dim=model.kv_channels,
        max_position_embeddings=int(original * scaling.factor),  # no formula reads it; others draw a warning
        rope_theta=model.rotary_base,
        rope_scaling=scaling.formula(),
    )
    cpu = torch.device("cpu")
    with cpu:
        frequencies, factor = ROPE_INIT_FUNCTIONS[scaling.type](config, cpu)
    return frequencies.float(), float(factor)
