"""Frequencies of rotary positions: scaled ones by transformers' own formulas, and others in another phase."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_sgt.config.model import ModelConfig
from megatron_sgt.model.apply_plan import sgt_layers


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


def set_positions(chunks: Iterable[GPTModel], model: ModelConfig, device: torch.device) -> None:
    """Give a built model the rotary positions of ``model``, as if it had been built with them."""
    frequencies, factor = scaled_frequencies(model)
    for chunk in chunks:
        if frequencies is None:
            on_cpu = chunk.config.use_cpu_initialization
            plain = RotaryEmbedding(
                chunk.config.kv_channels, 1.0, rotary_base=model.rotary_base, use_cpu_initialization=on_cpu
            )
            chunk.rotary_pos_emb.inv_freq = plain.inv_freq
        else:
            chunk.rotary_pos_emb.inv_freq = frequencies.to(device)
        for layer in sgt_layers(chunk):
            layer.tables.factor = factor
    RotaryEmbedding.forward.cache_clear()  # else it answers with the former angles
