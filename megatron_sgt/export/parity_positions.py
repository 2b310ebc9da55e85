"""Whether an exported model turns its heads as the project's does where no probe is long enough to tell."""

from __future__ import annotations

from typing import Any

import torch

from megatron_sgt.config.model import ModelConfig
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.ops.rotary import rotary_table

TOLERANCE = 1e-6
"""Of cos and sin, in fp32."""


def probe_positions(model: ModelConfig) -> list[int]:
    """Around the context before a scaling, and around what an export names; [] without a scaling."""
    scaling = model.rotary_scaling
    if scaling is None:
        return []
    ends = (scaling.original_max_position_embeddings, model.seq_length, scaling.context_length)
    near = {n for end in ends if end for n in (end // 2, end - 1, end, 2 * end)}
    return sorted({0, 1, *near})


def rotary_gap(own: LanguageModel, theirs: Any, positions: list[int]) -> float:
    """Largest difference of cos and sin at ``positions``; ``theirs``: a decoder of transformers."""
    at = torch.tensor(positions)
    gpt = own.chunks[0]
    angles = at[:, None].float() * gpt.rotary_pos_emb.inv_freq
    mine = rotary_table(torch.cat([angles, angles], dim=-1)[:, None, None], gpt.decoder.layers[0].tables.factor)
    found = theirs.rotary_emb(torch.zeros(1), at[None])
    pairs = zip((mine.cos, mine.sin), found, strict=True)
    return max(float((wide[0, :, : one.shape[-1]] - one).abs().max()) for one, wide in pairs)
