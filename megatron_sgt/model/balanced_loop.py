"""Balanced head looping: every tensor-parallel rank loops its own share of the tokens, for all kept heads.

With h kept heads on one or two of many ranks, looping at the owner leaves the others idle and moves the whole
[S, B, D] through an all-gather and a reduce-scatter. Here each rank has all kept weights (``kept_weights.py``),
projects its own S/tp tokens, all-gathers only keys and values of the kept heads, attends for its own queries,
and projects back into its own residual:

    bytes per pass and direction   owner  2 · S·B·D        balanced  2 · S·B·(kept groups)·H

Every rank does the same projections. The attention is causal, so rank r of t does (2r + 1)/t of the mean work:
the last rank's share of the loop's attention is at most twice the mean.

Without sequence parallelism the activations are replicated: a rank still projects and attends for its share only,
and the heads' outputs are gathered too; in the backward pass the projections' gradients are gathered instead of
those of [S, B, D], and the input gradient is computed on every rank.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megatron_sgt.model import fused_pass
from megatron_sgt.model.head_loop import LoopingLayer, attend_kept, split_heads
from megatron_sgt.model.kept_weights import KeptWeights
from megatron_sgt.ops.fused_loop import HeadBlocks
from megatron_sgt.ops.rotary import Rotary, rotate_halves
from megatron_sgt.ops.shard_attention import shard_attention


def balanced_loop(layer: LoopingLayer, x: Tensor, rotary: Tensor, kept: KeptWeights, index: int) -> Tensor:
    """One loop pass of the kept heads, each rank for its share of the tokens.

    Args:
        x: [S/tp, B, D] under sequence parallelism, else [S, B, D].
        kept: the layer's kept weights.
        index: number of the pass, from 1.
    """
    attention = layer.self_attention
    rank, size = layer.head_layout.tp_rank, layer.head_layout.tp_size
    sharded = layer.config.sequence_parallel

    def project_in(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = kept.qkv.get(weight, index)
        bias = None if bias is None else kept.qkv_bias.get(bias, index)
        return (
            F.linear(tokens, weight, bias)
            if sharded
            else _ShareOfTokens.apply(tokens, weight, bias, kept.group)
        )

    def project_out(heads: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
        return F.linear(heads, kept.proj.get(weight, index))

    own = _own_positions(layer.rotary_table(rotary), rank, size)
    fused = attention.linear_qkv(layer.input_layernorm(x), use=project_in)
    query, key, value = split_heads(fused, kept.heads, kept.groups, layer)
    query, key = rotate_halves(query, own), rotate_halves(key, own)
    out = _attend(layer, query, key, value, kept, index).flatten(2)
    if not sharded:
        out = mappings.gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False)
    return layer.add_residual(attention.linear_proj(out, use=project_out), x)


def _attend(
    layer: LoopingLayer, query: Tensor, key: Tensor, value: Tensor, kept: KeptWeights, index: int
) -> Tensor:
    """This rank's queries [S/tp, B, h, H] against the keys and values [S/tp, B, g, H] of all ranks."""
    rank, size = layer.head_layout.tp_rank, layer.head_layout.tp_size
    everyone = mappings.gather_from_sequence_parallel_region(
        torch.cat([key, value], dim=2), tensor_parallel_output_grad=True
    )
    # The causal mask hides the tokens of later ranks.
    key, value = everyone[: (rank + 1) * len(query)].split([kept.groups, kept.groups], dim=2)
    measured = kept.head_ids if rank == size - 1 else None  # the last row is the last rank's
    attend = partial(layer.self_attention.core_attention.run, shard_attention)
    return attend_kept(layer, query, key, value, kept.kv_slot, index, measured, attend)


def fused_balanced_loop(
    layer: LoopingLayer, x: Tensor, rotary: Rotary, kept: KeptWeights, blocks: HeadBlocks, index: int
) -> Tensor:
    """``balanced_loop`` under sequence parallelism, x [S/tp, B, D], with fused projections."""
    query, key, value, residual = fused_pass.project_in(
        layer,
        x,
        blocks,
        _own_positions(rotary, layer.head_layout.tp_rank, layer.head_layout.tp_size),
        lambda weight, bias: (
            kept.qkv.get(weight, index),
            None if bias is None else kept.qkv_bias.get(bias, index),
        ),
    )
    out = _attend(layer, query, key, value, kept, index)
    return fused_pass.project_out(layer, out, residual, blocks, lambda weight: kept.proj.get(weight, index))


def _own_positions(rotary: Rotary, rank: int, size: int) -> Rotary:
    """The table of the tokens of one of ``size`` ranks."""
    share = len(rotary.cos) // size
    own = slice(rank * share, (rank + 1) * share)
    return Rotary(rotary.cos[own], rotary.sin[own])


class _ShareOfTokens(torch.autograd.Function):
    """x [S, B, D], replicated -> this rank's tokens through the projection: [S/tp, B, rows].

    Backward: all ranks' output gradients are gathered (rows are few, D is not), so that every rank has the
    whole gradient of x, W and b, and all have the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        """Project this rank's share."""
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.has_bias = group, bias is not None
        share = x.shape[0] // dist.get_world_size(group)
        first = dist.get_rank(group) * share
        return F.linear(x[first : first + share], weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Whole gradients on every rank."""
        x, weight = ctx.saved_tensors
        whole = grad.new_empty(x.shape[0], *grad.shape[1:])
        dist.all_gather_into_tensor(whole, grad.contiguous(), group=ctx.group)
        flat = whole.flatten(0, 1)
        bias_grad = flat.sum(0) if ctx.has_bias else None
        return whole @ weight, flat.t() @ x.flatten(0, 1), bias_grad, None
