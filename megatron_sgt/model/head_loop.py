"""The loop: x ← x + W_o · concat_h( g_h · head_h(Norm(x)) ), executed K times (SGT.md, "Forward pass of a layer").

Ways that give the same numbers where they apply:

* ``dense_loop`` (decay window): the layer's own attention modules run again on all heads, with gates.
* ``sparse_loop`` (after it): only the kept heads are projected, attended and projected back. Rows of W_qkv
  and columns of W_o are selected; key/value groups that several kept heads share are projected once. Each
  tensor-parallel rank computes the kept heads that it owns.
* ``fused_pass.fused_sparse_loop`` (after it, where Triton kernels run): the same in three operations.
* ``balanced_loop.balanced_loop`` (after it, several tensor-parallel ranks): each rank computes all kept heads
  for its share of the tokens; ``sparse_loop`` is its definition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout, KeptHeads
from megatron_sgt.growth import LayerPlan
from megatron_sgt.ops import fused_loop
from megatron_sgt.ops.backend import choose_attention
from megatron_sgt.ops.fused_loop import HeadBlocks
from megatron_sgt.ops.rotary import Rotary, rotate_halves
from megatron_sgt.ops.tiles import arch_of


class LoopingLayer(Protocol):
    """What a loop needs of a transformer layer: Megatron-Core's modules, and the head layout."""

    config: Any
    training: bool
    head_layout: HeadLayout
    input_layernorm: Any
    self_attention: Any
    blocks: HeadBlocks | None

    def rotary_table(self, angles: Tensor) -> Rotary:
        """cos and sin of the angles [S, 1, 1, H] that Megatron-Core hands to a layer."""

    def rotation(self, angles: Tensor) -> AbstractContextManager[None]:
        """In the body the attention rotates by itself, and is called without ``rotary_pos_emb``."""

    def add_residual(self, out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        """residual + dropout(out + bias), as after the ordinary attention."""


@dataclass(frozen=True)
class LoopState:
    """A LayerPlan turned into this rank's indices and tensors.

    ``gates`` [N]: gates of this rank's heads, used in the window. ``qkv_rows`` [(R + 2 kept groups) * H] and
    ``proj_columns`` [R * H]: indices into the local weights; ``heads`` [R]: global ids of this rank's kept heads;
    ``kv_slot`` [R]: see ``KeptHeads``.
    """

    plan: LayerPlan
    kept: KeptHeads
    gates: Tensor
    heads: Tensor
    kv_slot: Tensor
    qkv_rows: Tensor
    proj_columns: Tensor


def loop_state(plan: LayerPlan, layout: HeadLayout, before: LoopState | None = None) -> LoopState | None:
    """Prepare ``plan`` for the rank that ``layout`` describes; None if the layer has no head loops.

    Args:
        before: what the layer executed so far. Of the same kept heads its indices are taken over: in a window only
            the gates are new. What is new lies on the host.
    """
    if plan.loops == 0:
        return None
    values = [1.0 if head in plan.kept_heads else plan.other_gate for head in layout.owned_heads]
    gates = torch.tensor(values, dtype=torch.float32)
    if before is not None and before.plan.kept_heads == plan.kept_heads:
        return replace(before, plan=plan, gates=gates)
    kept = layout.local(plan.kept_heads)

    def index(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    return LoopState(
        plan=plan,
        kept=kept,
        gates=gates,
        heads=index(head + layout.owned_heads.start for head in kept.heads),
        kv_slot=index(kept.kv_slot),
        qkv_rows=index(kept.qkv_rows),
        proj_columns=index(kept.proj_columns),
    )


def dense_loop(layer: LoopingLayer, x: Tensor, rotary: Tensor, state: LoopState, index: int) -> Tensor:
    """One pass over all heads, each multiplied by its gate."""
    attention = layer.self_attention
    with attention.core_attention.loop_pass(index, state.gates), layer.rotation(rotary):
        out = attention(layer.input_layernorm(x), attention_mask=None)
    return layer.add_residual(out, x)


def sparse_loop(layer: LoopingLayer, x: Tensor, rotary: Tensor, state: LoopState, index: int) -> Tensor:
    """One pass over the kept heads only, all at gate 1. Each rank computes those that it owns.

    A rank that owns none goes the same way with tensors of no heads: it then calls the same modules and enters
    the same collectives as its peers, in the forward and in the backward pass.
    """
    attention = layer.self_attention
    heads, groups = len(state.kept.heads), len(state.kept.groups)

    def project_in(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not heads:
            return tokens[..., :0]
        return F.linear(tokens, weight[state.qkv_rows], None if bias is None else bias[state.qkv_rows])

    def project_out(out: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
        if not heads:
            return out.new_zeros(*out.shape[:2], layer.config.hidden_size) + out.sum()
        return F.linear(out, weight[:, state.proj_columns])

    tokens = _enter_tensor_parallel(layer.input_layernorm(x), layer)
    fused = attention.linear_qkv(tokens, use=project_in)
    query, key, value = split_heads(fused, heads, groups, layer)
    table = layer.rotary_table(rotary)
    query, key = (rotate_halves(t, table) for t in (query, key))
    if heads:
        attend = attention.core_attention.attend
        out = attend_kept(layer, query, key, value, state.kv_slot, index, state.heads, attend)
    else:
        # The sum of three empty tensors is empty too, and the gradient passes through all of them.
        out = query + key + value
    partial, bias = attention.linear_proj(out.reshape(*out.shape[:2], -1), use=project_out)
    return layer.add_residual((_leave_tensor_parallel(partial, layer), bias), x)


def attend_kept(
    layer: LoopingLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_slot: Tensor,
    index: int,
    heads: Tensor | None,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """Causal attention of the kept heads from the last positions, and their entropies in a step that measures.

    Args:
        query: [Q, B, h, H], rotated. key, value: [K, B, g, H]. kv_slot: [h], group of each head.
        index: number of the pass, from 1.
        heads: global ids [h]; None: the last query is not the sequence's last, nothing is measured.
        attend: the library's way, for key and value [K, B, h, H]. A fused layer takes the kernel of
            ``ops.fused_loop`` instead where that is thought faster (``ops.backend.choose_attention``).

    Returns:
        [Q, B, h, H].
    """
    core = layer.self_attention.core_attention
    measure = layer.training and core.meter.enabled and heads is not None
    length, at = key.shape[0], layer.blocks
    pairs, size = query.shape[1] * query.shape[2], query.shape[3]
    wanted = core.loop_attention
    if at is not None and choose_attention(pairs, length, size, arch_of(query), wanted) == "custom":
        out, rows = core.run(lambda q, k, v: fused_loop.attend(q, k, v, at, measure), query, key, value)
        if measure:
            entropy = rows[:, :, -1].mean(0) / math.log(max(2, length))  # that of one token is 0
            core.meter.store(core.layer_id, index, entropy, heads)
        return out
    if key.shape[2] != query.shape[2]:
        # The kept heads may share groups unevenly: give each head its own view.
        key, value = key[:, :, kv_slot], value[:, :, kv_slot]
    if measure:
        core.meter.store(core.layer_id, index, core.entropy(query.detach(), key.detach()), heads)
    return attend(query, key, value)


def split_heads(fused: Tensor, heads: int, groups: int, layer: LoopingLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Kept projections [S, B, (heads + 2 groups) H] -> query [S, B, heads, H], key and value [S, B, groups, H].

    Queries and keys come back normalised, if the model has q/k norms.
    """
    attention = layer.self_attention
    blocks = fused.view(*fused.shape[:2], heads + 2 * groups, layer.head_layout.head_dim)
    query, key, value = blocks.split([heads, groups, groups], dim=2)
    if attention.q_layernorm is not None:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    return query, key, value


def _enter_tensor_parallel(x: Tensor, layer: LoopingLayer) -> Tensor:
    """Replicate x to every tensor-parallel rank; the backward pass sums the ranks' gradients."""
    if layer.config.sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
    return mappings.copy_to_tensor_model_parallel_region(x)


def _leave_tensor_parallel(partial: Tensor, layer: LoopingLayer) -> Tensor:
    """Sum the ranks' parts of the output projection."""
    if layer.config.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(partial)
    return mappings.reduce_from_tensor_model_parallel_region(partial)
