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

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.model.documents import DocumentMask
from megatron_sgt.model.head_loop import KeptLoop, LoopingLayer
from megatron_sgt.model.kept_weights import KeptWeights
from megatron_sgt.ops.documents import Documents
from megatron_sgt.ops.rotary import Rotary, rotate_halves
from megatron_sgt.ops.shard_attention import shard_attention


@dataclass(eq=False)
class BalancedLoop(KeptLoop):
    """Each rank loops all kept heads for its share of the tokens.

    Args:
        layout: this rank's share of the heads, for its place among the tensor-parallel ranks.
        sharded: whether x holds this rank's tokens alone (sequence parallelism).
    """

    weights: KeptWeights
    layout: HeadLayout
    sharded: bool

    def __call__(
        self, layer: LoopingLayer, x: Tensor, rotary: Rotary, index: int, mask: DocumentMask | None = None
    ) -> Tensor:
        attention, own = layer.self_attention, self.positions(rotary)
        project_in = partial(self._project_in, index=index)
        fused = attention.linear_qkv(layer.input_layernorm(x), use=project_in)
        query, key, value = self.split_heads(fused, layer)
        query, key = rotate_halves(query, own), rotate_halves(key, own)
        out = self.attention(layer, query, key, value, index, mask).flatten(2)
        if not self.sharded:
            out = mappings.gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False)
        project_out = partial(self._project_out, index=index)
        return layer.add_residual(attention.linear_proj(out, use=project_out), x)

    def _project_in(self, tokens: Tensor, weight: Tensor, bias: Tensor | None, index: int) -> Tensor:
        weight, bias = self.projection(weight, bias, index)
        if self.sharded:
            return F.linear(tokens, weight, bias)
        return _ShareOfTokens.apply(tokens, weight, bias, self.weights.group)

    def _project_out(self, heads: Tensor, weight: Tensor, _: Tensor | None, index: int) -> Tensor:
        return F.linear(heads, self.output_weight(weight, index))

    def projection(self, weight: Tensor, bias: Tensor | None, index: int) -> tuple[Tensor, Tensor | None]:
        weight = self.weights.qkv.get(weight, index)
        return weight, None if bias is None else self.weights.qkv_bias.get(bias, index)

    def output_weight(self, weight: Tensor, index: int) -> Tensor:
        return self.weights.proj.get(weight, index)

    def positions(self, rotary: Rotary) -> Rotary:
        """The table of this rank's share of the tokens."""
        share = len(rotary.cos) // self.layout.tp_size
        own = slice(self.layout.tp_rank * share, (self.layout.tp_rank + 1) * share)
        return Rotary(rotary.cos[own], rotary.sin[own])

    def attention(
        self, layer: LoopingLayer, query: Tensor, key: Tensor, value: Tensor, index: int, mask: DocumentMask | None
    ) -> Tensor:
        """This rank's queries [S/tp, B, h, H] against the keys and values [S/tp, B, g, H] of all ranks."""
        rank, groups = self.layout.tp_rank, self.blocks.groups
        everyone = mappings.gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=2), tensor_parallel_output_grad=True
        )
        # The causal mask hides the tokens of later ranks.
        key, value = everyone[: (rank + 1) * len(query)].split([groups, groups], dim=2)

        def library(query: Tensor, key: Tensor, value: Tensor, documents: Documents | None) -> Tensor:
            run, attend = layer.self_attention.core_attention.run, partial(shard_attention, documents=documents)
            return run(attend, query, key, value)

        return self.attend(layer, query, key, value, index, mask, library, rank == self.layout.tp_size - 1)

    def begin_step(self) -> None:
        """Kept weights are fetched again at their next use."""
        for part in self.weights.slices:
            part.begin_step()

    def mark_micro_batch(self, last: bool) -> None:
        """The step's last micro-batch returns gradients to the owners."""
        for part in self.weights.slices:
            part.last_micro_batch = last


class _ShareOfTokens(torch.autograd.Function):
    """x [S, B, D], replicated -> this rank's tokens through the projection: [S/tp, B, rows].

    Backward: all ranks' output gradients are gathered (rows are few, D is not), so that every rank has the
    whole gradient of x, W and b, and all have the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.has_bias = group, bias is not None
        share = x.shape[0] // dist.get_world_size(group)
        first = dist.get_rank(group) * share
        return F.linear(x[first : first + share], weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        whole = grad.new_empty(x.shape[0], *grad.shape[1:])
        dist.all_gather_into_tensor(whole, grad.contiguous(), group=ctx.group)
        flat = whole.flatten(0, 1)
        bias_grad = flat.sum(0) if ctx.has_bias else None
        return whole @ weight, flat.t() @ x.flatten(0, 1), bias_grad, None
