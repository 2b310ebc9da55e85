"""A Megatron-Core transformer layer that executes a LayerPlan.

Two seams are used, both stable from Megatron-Core 0.16 on: ``TransformerLayer._forward_attention`` (called
first, then the loop runs, before the MLP) and the ``core_attention`` slot of the spec.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.growth import LayerPlan
from megatron_sgt.model.balanced_loop import balanced_loop, fused_balanced_loop
from megatron_sgt.model.fused_pass import blocks_alone, blocks_in_place, fused_sparse_loop
from megatron_sgt.model.head_loop import LoopState, dense_loop, loop_state, sparse_loop
from megatron_sgt.model.kept_weights import KeptWeights, kept_weights
from megatron_sgt.ops.fused_loop import HeadBlocks
from megatron_sgt.ops.rotary import Rotary, RotaryTables
from megatron_sgt.parallel.rng import recompute_contexts


@dataclass(frozen=True)
class Execution:
    """A plan of one layer with the indices and gates that it takes."""

    plan: LayerPlan
    loop: LoopState | None
    kept_weights: KeptWeights | None
    blocks: HeadBlocks | None


class SGTLayer(TransformerLayer):
    """TransformerLayer with head loops between attention and MLP. With the default plan it is its parent.

    Args (beyond the parent's):
        head_layout: this rank's share of the heads.
        balanced: loop kept heads in the balanced way (see ``balanced_loop``) instead of at their owners.
        recompute: ids of the layers whose activations are computed again in the backward pass.
        fused: loop kept heads through the fused operations (see ``fused_pass``).
        tables: cos and sin of the rotary angles, shared by all layers.
        fused_rotary: rotate queries and keys of all heads in one compiled function (``ops.rotary``).
    """

    def __init__(
        self,
        *args: Any,
        head_layout: HeadLayout,
        balanced: bool,
        recompute: tuple[int, ...],
        fused: bool,
        tables: RotaryTables,
        fused_rotary: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.head_layout = head_layout
        self.balanced = balanced
        self.layer_id = self.layer_number - 1  # Megatron counts layers from 1, over all pipeline stages
        self.recompute = self.layer_id in recompute
        self.fused = fused
        self.plan = LayerPlan()
        self.kept_weights: KeptWeights | None = None
        self._loop: LoopState | None = None
        self.blocks: HeadBlocks | None = None
        self.tables = tables
        self.fused_rotary = fused_rotary

    def prepare(self, plan: LayerPlan) -> Execution:
        """What ``execute`` needs for ``plan``; what is new of it lies on the host."""
        loop, kept, blocks = loop_state(plan, self.head_layout, self._loop), None, None
        if self.balanced and plan.phase == "sparse":
            partial = self.config.sequence_parallel
            kept = kept_weights(plan.kept_heads, self.head_layout, self.pg_collection.tp, partial)
        if self.fused and plan.phase == "sparse" and loop is not None:
            blocks = self._kept_blocks(loop, kept)
        return Execution(plan, loop, kept, blocks)

    def execute(self, execution: Execution) -> None:
        """Execute a plan, prepared and on the layer's device, from the next forward on."""
        self.plan, self._loop = execution.plan, execution.loop
        self.kept_weights, self.blocks = execution.kept_weights, execution.blocks

    def _kept_blocks(self, state: LoopState, kept: KeptWeights | None) -> HeadBlocks | None:
        size = self.head_layout.head_dim
        if kept is not None:
            return blocks_alone(kept.heads, kept.groups, kept.kv_slot, size)
        return blocks_in_place(state, size) if state.kept.heads else None

    def rotary_table(self, angles: Tensor) -> Rotary:
        """cos and sin of the angles that Megatron-Core hands to the layer."""
        return self.tables.of(angles)

    @contextlib.contextmanager
    def rotation(self, angles: Tensor) -> Iterator[None]:
        """In the body the core attention rotates, and the attention is called without ``rotary_pos_emb``."""
        with self.self_attention.core_attention.rotated(self.rotary_table(angles), self.fused_rotary):
            yield

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Call the layer with its input as a positional argument: the hooks of torch and ZeRO-3 see no others."""
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Megatron's forward on [S, B, D], repeated as a whole for the block-loop baseline."""
        for _ in range(self.plan.block_loops):
            hidden_states, _context = self._forward_once(hidden_states, *args, **kwargs)
        return self._forward_once(hidden_states, *args, **kwargs)

    def _forward_once(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        forward = super().forward
        if self.recompute and self.training and torch.is_grad_enabled():
            # One segment holds the ordinary pass and the loop: they share weights, which ZeRO reduces once.
            contexts = recompute_contexts
            return checkpoint(
                forward, hidden_states, *args, use_reentrant=False, context_fn=contexts, **kwargs
            )
        return forward(hidden_states, *args, **kwargs)

    def _forward_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        angles = kwargs.pop("rotary_pos_emb")
        with self.rotation(angles):
            hidden, context = super()._forward_attention(
                hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs
            )
        for index in range(1, self.plan.loops + 1):
            hidden = self._loop_pass(hidden, angles, index)
        return hidden, context

    def _loop_pass(self, x: Tensor, rotary: Tensor, index: int) -> Tensor:
        assert self._loop is not None
        if self.plan.phase == "window":
            return dense_loop(self, x, rotary, self._loop, index)
        kept, at = self.kept_weights, self.blocks
        if kept is not None and at is not None and self.config.sequence_parallel:
            return fused_balanced_loop(self, x, self.rotary_table(rotary), kept, at, index)
        if kept is not None:
            return balanced_loop(self, x, rotary, kept, index)
        if at is not None and self.head_layout.tp_size == 1:
            return fused_sparse_loop(self, x, self.rotary_table(rotary), self._loop, at, index)
        return sparse_loop(self, x, rotary, self._loop, index)

    def add_residual(self, out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        """residual + dropout(out + bias), as after the ordinary attention. Shapes [S, B, D]."""
        combine = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return combine(out_with_bias, residual, self.hidden_dropout)
