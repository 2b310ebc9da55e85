"""A loop pass of kept heads in three fused operations (``ops.fused_loop``); ``head_loop`` is its definition.

Weights are used inside calls of the modules that own them, one within the other, as ZeRO-3 needs it (see
``linear.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_sgt.model.head_loop import LoopingLayer, LoopState, attend_kept
from megatron_sgt.ops import fused_loop
from megatron_sgt.ops.fused_loop import HeadBlocks, head_blocks
from megatron_sgt.ops.rotary import Rotary


def blocks_in_place(state: LoopState, size: int) -> HeadBlocks:
    """Kept heads as blocks of this rank's own weights; ``size``: H."""
    return head_blocks(state.qkv_rows, state.proj_columns, state.kv_slot, size)


def blocks_alone(heads: int, groups: int, kv_slot: Tensor, size: int) -> HeadBlocks:
    """Kept heads as blocks of weights that hold nothing else."""
    rows = torch.arange((heads + 2 * groups) * size, device=kv_slot.device)
    return head_blocks(rows, rows[: heads * size], kv_slot, size, whole=True)


def fused_sparse_loop(
    layer: LoopingLayer, x: Tensor, rotary: Rotary, state: LoopState, blocks: HeadBlocks, index: int
) -> Tensor:
    """One pass over the kept heads, as ``sparse_loop`` on one tensor-parallel rank; x [S, B, D]."""
    query, key, value, residual = project_in(layer, x, blocks, rotary)
    attend = layer.self_attention.core_attention.attend
    out = attend_kept(layer, query, key, value, state.kv_slot, index, state.heads, attend)
    return project_out(layer, out, residual, blocks)


def project_in(
    layer: LoopingLayer,
    x: Tensor,
    blocks: HeadBlocks,
    rotary: Rotary,
    select: Any = lambda weight, bias: (weight, bias),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query [S, B, h, H], key and value [S, B, g, H], residual [S, B, D] (see ``fused_loop.project_in``).

    Args:
        select: (W_qkv, bias) -> what of them ``blocks`` refers to.
    """
    attention = layer.self_attention

    def with_norm(x: Tensor, norm_weight: Tensor) -> Any:
        def with_projection(x: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            def with_head_norms(x: Tensor, head_norms: tuple[Tensor, Tensor] | None) -> Any:
                kept, kept_bias = select(weight, bias)
                eps = layer.input_layernorm.eps
                return fused_loop.project_in(x, norm_weight, kept, kept_bias, head_norms, blocks, rotary, eps)

            if attention.q_layernorm is None:
                return with_head_norms(x, None)
            return attention.q_layernorm(
                x, use=lambda x, q: attention.k_layernorm(x, use=lambda x, k: with_head_norms(x, (q, k)))
            )

        return attention.linear_qkv(x, use=with_projection)

    return layer.input_layernorm(x, use=with_norm)


def project_out(
    layer: LoopingLayer,
    heads: Tensor,
    residual: Tensor,
    blocks: HeadBlocks,
    select: Any = lambda weight: weight,
) -> Tensor:
    """residual + kept heads [S, B, h, H] through their columns of W_o (+ its bias): [S, B, D]."""
    out, bias = layer.self_attention.linear_proj(
        heads, use=lambda heads, weight, _: fused_loop.project_out(heads, residual, select(weight), blocks)
    )
    return out if bias is None else out + bias
