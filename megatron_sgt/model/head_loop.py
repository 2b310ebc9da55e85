"""The loop: x ← x + W_o · concat_h( g_h · head_h(Norm(x)) ), executed K times (SGT.md, "Forward pass of a layer").

With norms of outputs (``model.norm_position``) it is x ← x + Norm( W_o · concat_h( g_h · head_h(x) ) ), with the norm
of the ordinary pass. Norms of queries and keys over all heads are so in a loop too, as gates act after them.

A way of looping is one object, chosen when a plan is applied (``loop_pass.py``). All ways that apply to a plan
give the same numbers:

* ``DenseLoop`` (decay window): the layer's own attention modules run again on all heads, with gates.
* ``SparseLoop`` (after it): only the kept heads are projected, attended and projected back. Rows of W_qkv
  and columns of W_o are selected; key/value groups that several kept heads share are projected once. Each
  tensor-parallel rank computes the kept heads that it owns.
* ``balanced_loop.BalancedLoop`` (after it, several tensor-parallel ranks): each rank computes all kept heads
  for its share of the tokens; ``SparseLoop`` is its definition.
* ``fused_pass.FusedLoop`` (after it, where Triton kernels run): either of the two in three operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from megatron_sgt.model.documents import DocumentMask
from megatron_sgt.ops import fused_loop
from megatron_sgt.ops.backend import choose_attention
from megatron_sgt.ops.entropy import entropy_of_rows
from megatron_sgt.ops.head_blocks import HeadBlocks
from megatron_sgt.ops.rotary import Rotary, rotate_halves
from megatron_sgt.ops.tiles import arch_of


class LoopingLayer(Protocol):
    """What a loop needs of a transformer layer: Megatron-Core's modules, and the sum with the residual.

    ``branch_scale``: what ``add_residual`` multiplies its first argument by; None: by nothing.
    """

    config: Any
    training: bool
    input_layernorm: Any
    self_attention: Any
    branch_scale: float | None

    def add_residual(self, out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        """residual + dropout(out + bias), as after the ordinary attention."""


@dataclass(eq=False)
class LoopPass:
    """One way of looping, for one layer and one plan."""

    def __call__(
        self, layer: LoopingLayer, x: Tensor, rotary: Rotary, index: int, mask: DocumentMask | None = None
    ) -> Tensor:
        """One pass.

        Args:
            x: [S, B, D]; [S/tp, B, D] under sequence parallelism.
            rotary: the table of all S positions, or of each sequence's own.
            index: number of the pass, from 1.
            mask: the documents of the sequences.

        Returns:
            x plus the output of the looping heads.
        """
        raise NotImplementedError

    def begin_step(self) -> None:
        """Called when an optimizer step begins: weights may have changed."""

    def mark_micro_batch(self, last: bool) -> None:
        """Called before each micro-batch: whether it is the step's last one."""


@dataclass(eq=False)
class DenseLoop(LoopPass):
    """All heads, each multiplied by its gate. ``gates`` [N] fp32: of this rank's heads."""

    gates: Tensor

    def __call__(
        self, layer: LoopingLayer, x: Tensor, rotary: Rotary, index: int, mask: DocumentMask | None = None
    ) -> Tensor:
        attention = layer.self_attention
        with attention.core_attention.loop_pass(index, self.gates), attention.core_attention.rotated(rotary):
            out = attention(layer.input_layernorm(x), attention_mask=mask)
        return layer.add_residual(out, x)


@dataclass(eq=False)
class KeptLoop(LoopPass):
    """Common to the ways that loop only the kept heads, all at gate 1.

    The methods are those of a rank that loops the kept heads it owns, for all tokens.

    Args:
        kernels: whether the project's own attention may be taken (see ``ops.backend.choose_attention``).
    """

    blocks: HeadBlocks
    kernels: bool

    def projection(self, weight: Tensor, bias: Tensor | None, index: int) -> tuple[Tensor, Tensor | None]:
        """The W_qkv, and its bias, that ``blocks`` are blocks of, from this rank's own."""
        return weight, bias

    def output_weight(self, weight: Tensor, index: int) -> Tensor:
        """The W_o that ``blocks`` are blocks of, from this rank's own."""
        return weight

    def positions(self, rotary: Rotary) -> Rotary:
        return rotary

    def attention(
        self, layer: LoopingLayer, query: Tensor, key: Tensor, value: Tensor, index: int, mask: DocumentMask | None
    ) -> Tensor:
        """Causal attention of this rank's queries [Q, B, h, H]; key and value [Q, B, g, H], all rotated."""
        return self.attend(layer, query, key, value, index, mask, layer.self_attention.core_attention.attend)

    def attend(
        self,
        layer: LoopingLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        index: int,
        mask: DocumentMask | None,
        library: Callable[..., Tensor],
        holds_last_row: bool = True,
    ) -> Tensor:
        """Causal attention from the last positions, and its entropies in a step that measures.

        Args:
            query: [Q, B, h, H], rotated. key, value: [K, B, g, H].
            library: the library's way, for key and value [K, B, h, H] and ``documents``. With ``kernels`` the kernel of
                ``ops.fused_loop`` is taken instead where ``choose_attention`` expects it to be faster.
            holds_last_row: whether the last query is the sequence's last; else nothing is measured. With documents
                the last tokens before the padding may be any.

        Returns:
            [Q, B, h, H].
        """
        core, blocks = layer.self_attention.core_attention, self.blocks
        documents = None if mask is None else mask.attention
        measure = layer.training and core.meter.enabled and (holds_last_row or documents is not None)
        if self.kernels and _takes_kernel(query, key, core.loop_attention):
            out, rows = core.run(
                lambda q, k, v: fused_loop.attend(q, k, v, blocks, measure, documents), query, key, value
            )
            if measure:
                core.meter.store(core.layer_id, index, _last_rows(rows, key.shape[0], mask), blocks.ids)
            return out
        if key.shape[2] != query.shape[2]:
            # The kept heads may share groups unevenly: give each head its own view.
            key, value = key[:, :, blocks.slot_index], value[:, :, blocks.slot_index]
        if measure:
            core.meter.store(core.layer_id, index, core.measured(query, key, mask), blocks.ids)
        return library(query, key, value, documents=documents)

    def split_heads(self, fused: Tensor, layer: LoopingLayer) -> tuple[Tensor, Tensor, Tensor]:
        """Kept projections [S, B, (h + 2g) H] -> query [S, B, h, H], key and value [S, B, g, H].

        Queries and keys come back normalised, if the model has q/k norms.
        """
        attention, heads, groups = layer.self_attention, self.blocks.heads, self.blocks.groups
        parts = fused.view(*fused.shape[:2], heads + 2 * groups, self.blocks.size)
        query, key, value = parts.split([heads, groups, groups], dim=2)
        if attention.q_layernorm is not None:
            query, key = attention.q_layernorm(query), attention.k_layernorm(key)
        return query, key, value


@dataclass(eq=False)
class SparseLoop(KeptLoop):
    """Each rank loops the kept heads that it owns.

    A rank that owns none goes the same way with tensors of no heads: it then calls the same modules and enters
    the same collectives as its peers, in the forward and in the backward pass.

    Args:
        whole_projection: whether queries and keys are normalised over all heads, so that those of all are projected.
    """

    whole_projection: bool = False

    def __call__(
        self, layer: LoopingLayer, x: Tensor, rotary: Rotary, index: int, mask: DocumentMask | None = None
    ) -> Tensor:
        attention = layer.self_attention
        query, key, value = self._projections(layer, layer.input_layernorm(x))
        query, key = rotate_halves(query, rotary), rotate_halves(key, rotary)
        if self.blocks.heads:
            out = self.attention(layer, query, key, value, index, mask)
        else:
            # The sum of three empty tensors is empty too, and the gradient passes through all of them.
            out = query + key + value
        partial, bias = attention.linear_proj(out.flatten(2), use=self._project_out)
        return layer.add_residual((_leave_tensor_parallel(partial, layer), bias), x)

    def _projections(self, layer: LoopingLayer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query [S, B, h, H], key and value [S, B, g, H] of the kept heads, not rotated."""
        attention, blocks = layer.self_attention, self.blocks
        if self.whole_projection:
            query, key, value = attention.get_query_key_value_tensors(x)
            return query[:, :, blocks.head_index], key[:, :, blocks.group_index], value[:, :, blocks.group_index]
        tokens = _enter_tensor_parallel(x, layer)
        return self.split_heads(attention.linear_qkv(tokens, use=self._project_in), layer)

    def _project_in(self, tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.blocks.heads:
            return tokens[..., :0]
        rows = self.blocks.row_index
        return F.linear(tokens, weight[rows], None if bias is None else bias[rows])

    def _project_out(self, out: Tensor, weight: Tensor, _: Tensor | None) -> Tensor:
        if not self.blocks.heads:
            return out.new_zeros(*out.shape[:2], weight.shape[0]) + out.sum()
        return F.linear(out, weight[:, self.blocks.column_index])


def _last_rows(rows: Tensor, keys: int, mask: DocumentMask | None) -> Tensor:
    """As ``SGTCoreAttention.measured``, from the entropies of all rows [B, h, Q] in nats."""
    if mask is not None and mask.attention is not None:
        return entropy_of_rows(rows, keys, mask.attention, mask.fewest)[0]
    # The entropy of a single token is 0.
    mean = rows[:, :, -1].mean(0) / math.log(max(2, keys))
    return mean if mask is None else mean * mask.counted


def _takes_kernel(query: Tensor, key: Tensor, wanted: Any) -> bool:
    pairs, size = query.shape[1] * query.shape[2], query.shape[3]
    return choose_attention(pairs, key.shape[0], size, arch_of(query), wanted) == "custom"


def _enter_tensor_parallel(x: Tensor, layer: LoopingLayer) -> Tensor:
    """Replicate x to every tensor-parallel rank; the backward pass sums the ranks' gradients."""
    if layer.config.sequence_parallel:
        return mappings.gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True)
    return mappings.copy_to_tensor_model_parallel_region(x)


def _leave_tensor_parallel(partial: Tensor, layer: LoopingLayer) -> Tensor:
    if layer.config.sequence_parallel:
        return mappings.reduce_scatter_to_sequence_parallel_region(partial)
    return mappings.reduce_from_tensor_model_parallel_region(partial)
