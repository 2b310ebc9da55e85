"""A Megatron-Core transformer layer that executes a LayerPlan.

Two seams are used, both stable from Megatron-Core 0.16 on: ``TransformerLayer._forward_attention`` (called
first, then the loop runs, before the MLP) and the ``core_attention`` slot of the spec.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_sgt.growth import LayerPlan
from megatron_sgt.model.head_loop import LoopState, loop_state, run_loops
from megatron_sgt.parallel.head_layout import HeadLayout


class SGTLayer(TransformerLayer):
    """TransformerLayer with head loops between attention and MLP. With the default plan it is its parent."""

    def __init__(self, *args: Any, head_layout: HeadLayout, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.head_layout = head_layout
        self.layer_id = self.layer_number - 1  # Megatron counts layers from 1, over all pipeline stages
        self.plan = LayerPlan()
        self._loop: LoopState | None = None

    def apply_plan(self, plan: LayerPlan, device: torch.device) -> None:
        """Execute ``plan`` from the next forward on."""
        if plan != self.plan:
            self.plan = plan
            self._loop = loop_state(plan, self.head_layout, device)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Megatron's forward on [S, B, D], repeated as a whole for the block-loop baseline."""
        for _ in range(self.plan.block_loops):
            hidden_states, _context = super().forward(hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs)

    def _forward_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        hidden, context = super()._forward_attention(hidden_states, attention_mask, *args, **kwargs)
        if self._loop is not None:
            hidden = run_loops(self, hidden, kwargs["rotary_pos_emb"], self._loop)
        return hidden, context

    def add_residual(self, out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        """residual + dropout(out + bias), as after the ordinary attention. Shapes [S, B, D]."""
        combine = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return combine(out_with_bias, residual, self.hidden_dropout)
