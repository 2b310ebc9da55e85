"""The loop: x ← x + W_o · concat_h( g_h · head_h(Norm(x)) ), executed K times (SGT.md, "Forward pass of a layer").

Ways that give the same numbers where they apply:

* ``dense_loop`` (decay window): the layer's own attention modules run again on all heads, with gates.
* ``sparse_loop`` (after it): only the kept heads are projected, attended and projected back. Rows of W_qkv
  and columns of W_o are selected; key/value groups that several kept heads share are projected once. Each
  tensor-parallel rank computes the kept heads that it owns. A rank that owns none still enters every
  collective, forward and backward: a peer would wait for it for ever otherwise.
* ``balanced_loop.balanced_loop`` (after it, several tensor-parallel ranks): each rank computes all kept heads
  for its share of the tokens; ``sparse_loop`` is its definition.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megatron_sgt.growth import LayerPlan
from megatron_sgt.ops.entropy import last_row_entropy
from megatron_sgt.parallel.head_layout import HeadLayout, KeptHeads


class LoopingLayer(Protocol):
    """What a loop needs of a transformer layer: Megatron-Core's modules, and the head layout."""

    config: Any
    training: bool
    head_layout: HeadLayout
    input_layernorm: Any
    self_attention: Any

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


def loop_state(plan: LayerPlan, layout: HeadLayout, device: torch.device) -> LoopState | None:
    """Prepare ``plan`` for the rank that ``layout`` describes; None if the layer has no head loops."""
    if plan.loops == 0:
        return None
    kept = layout.local(plan.kept_heads)
    gates = [1.0 if head in plan.kept_heads else plan.other_gate for head in layout.owned_heads]

    def index(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=device)

    return LoopState(
        plan=plan,
        kept=kept,
        gates=torch.tensor(gates, dtype=torch.float32, device=device),
        heads=index(head + layout.owned_heads.start for head in kept.heads),
        kv_slot=index(kept.kv_slot),
        qkv_rows=index(kept.qkv_rows),
        proj_columns=index(kept.proj_columns),
    )


def dense_loop(layer: LoopingLayer, x: Tensor, rotary: Tensor, state: LoopState, index: int) -> Tensor:
    """One pass over all heads, each multiplied by its gate."""
    attention = layer.self_attention
    with attention.core_attention.loop_pass(index, state.gates):
        out = attention(layer.input_layernorm(x), attention_mask=None, rotary_pos_emb=rotary)
    return layer.add_residual(out, x)


def sparse_loop(layer: LoopingLayer, x: Tensor, rotary: Tensor, state: LoopState, index: int) -> Tensor:
    """One pass over the kept heads only, all at gate 1."""
    attention = layer.self_attention
    normed = _enter_tensor_parallel(layer.input_layernorm(x), layer)
    if state.kept.heads:
        partial = _kept_heads(layer, normed, rotary, state, index)
    else:
        partial = _nothing(attention, normed)
    out = _leave_tensor_parallel(partial, layer)
    return layer.add_residual((out, attention.linear_proj.summed_bias()), x)


def _nothing(attention: Any, x: Tensor) -> Tensor:
    """Zeros like x [S, B, D] that depend on everything whose gradient the peers reduce in the backward pass.

    The order of use is that of ``_kept_heads``, so that the reductions come in the same order on every rank.
    """
    zeros = torch.zeros_like(x) + x[..., :0].sum()
    for norm in (attention.q_layernorm, attention.k_layernorm):
        if norm is not None:
            zeros = zeros + norm.replicated(norm.weight)[:0].sum()
    return zeros


def _kept_heads(layer: LoopingLayer, x: Tensor, rotary: Tensor, state: LoopState, index: int) -> Tensor:
    """W_o[:, kept] · attention(W_qkv[kept] · x): x [S, B, D] -> [S, B, D], this rank's part of the sum."""
    attention = layer.self_attention
    linear = attention.linear_qkv
    heads, groups = len(state.kept.heads), len(state.kept.groups)
    bias = None if linear.bias is None else linear.bias[state.qkv_rows]
    fused = F.linear(x, linear.weight[state.qkv_rows], bias)
    blocks = fused.view(*x.shape[:2], heads + 2 * groups, layer.head_layout.head_dim)
    query, key, value = blocks.split([heads, groups, groups], dim=2)
    if attention.q_layernorm is not None:
        query, key = attention.q_layernorm(query), attention.k_layernorm(key)
    query, key = (rotate(t, rotary, attention) for t in (query, key))
    if groups != heads:  # the kept heads may share groups unevenly: give each head its own view
        key, value = key[:, :, state.kv_slot], value[:, :, state.kv_slot]
    core = attention.core_attention
    if layer.training and core.meter.enabled:
        core.meter.store(core.layer_id, index, last_row_entropy(query, key), state.heads)
    out = core.attend(query, key, value)
    weight = attention.linear_proj.weight[:, state.proj_columns]
    return F.linear(out.reshape(*out.shape[:2], -1), weight)


def rotate(heads: Tensor, rotary: Tensor, attention: Any) -> Tensor:
    return apply_rotary_pos_emb(heads, rotary, config=attention.config, cp_group=attention.pg_collection.cp)


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
