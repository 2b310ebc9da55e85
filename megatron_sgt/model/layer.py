"""A Megatron-Core transformer layer that executes a LayerPlan.

Two seams are used, both stable from Megatron-Core 0.16 on: ``TransformerLayer._forward_attention`` (called
first, then the loop runs, before the MLP) and the ``core_attention`` slot of the spec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

from megatron_sgt.growth import LayerPlan
from megatron_sgt.model.documents import document_mask
from megatron_sgt.model.head_loop import LoopPass
from megatron_sgt.model.loop_pass import LoopOptions, choose_loop_pass
from megatron_sgt.ops.rotary import RotaryTables
from megatron_sgt.parallel.rng import recompute_contexts


class SGTLayer(TransformerLayer):
    """TransformerLayer with head loops between attention and MLP. With the default plan it is its parent.

    Args (beyond the parent's):
        loop_options: what, besides the plan, decides the way of looping.
        output_norm: of what attention, each of its loops, and the MLP add to their input; None: their inputs are
            normalised.
        recompute: ids of the layers whose activations are computed again in the backward pass.
        tables: cos and sin of the rotary angles, shared by all layers.
    """

    def __init__(
        self,
        *args: Any,
        loop_options: LoopOptions,
        output_norm: type[Module] | None,
        recompute: tuple[int, ...],
        tables: RotaryTables,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.layer_id = self.layer_number - 1  # Megatron counts layers from 1, over all pipeline stages
        self.recompute = self.layer_id in recompute
        self.loop_options = loop_options
        self.tables = tables
        self.plan = LayerPlan()
        self.loop_pass: LoopPass | None = None
        self.branch_scale: float | None = None
        self.post_attention_layernorm = self.post_mlp_layernorm = None
        if output_norm is not None:
            self.post_attention_layernorm, self.post_mlp_layernorm = (
                output_norm(self.config, self.config.hidden_size, self.config.layernorm_epsilon) for _ in range(2)
            )
            self.scale_branches(None)

    def prepare(self, plan: LayerPlan) -> LoopPass | None:
        """What ``execute`` needs for ``plan``, on the host."""
        return choose_loop_pass(plan, self.loop_options, self.pg_collection.tp)

    def execute(self, plan: LayerPlan, loop_pass: LoopPass | None) -> None:
        """Execute a plan, prepared and on the layer's device, from the next forward on."""
        self.plan, self.loop_pass = plan, loop_pass

    def scale_branches(self, scale: float | None) -> None:
        """Compute x + scale · F(x) instead of x + F(x) from the next forward on, in loops too; None: as it was."""
        self.branch_scale = scale
        self.self_attn_bda = _sum(self.post_attention_layernorm, scale)
        self.mlp_bda = _sum(self.post_mlp_layernorm, scale)

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Call the layer with its input as a positional argument: the hooks of torch and ZeRO-3 see no others."""
        return super().__call__(hidden_states, *args, **kwargs)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Megatron's forward on [S, B, D], as often as the plan says: of a skipped layer the input comes out.

        It is skipped in here, so that hooks on the layer act in the same order as ever (ZeRO-3 fetches by them).
        """
        context = None
        for _ in range(self.plan.executions):
            hidden_states, context = self._forward_once(hidden_states, *args, **kwargs)
        return hidden_states, context

    def _forward_once(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        forward = super().forward
        if self.recompute and self.training and torch.is_grad_enabled():
            # One segment holds the ordinary pass and the loop: they share weights, which ZeRO reduces once.
            contexts = recompute_contexts
            return checkpoint(forward, hidden_states, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        return forward(hidden_states, *args, **kwargs)

    def _forward_attention(
        self, hidden_states: Tensor, attention_mask: object | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        mask = document_mask(attention_mask)
        rotary = self.tables.of(kwargs.pop("rotary_pos_emb"), None if mask is None else mask.positions)
        with self.self_attention.core_attention.rotated(rotary):
            hidden, context = super()._forward_attention(
                hidden_states, attention_mask, *args, rotary_pos_emb=None, **kwargs
            )
        if self.loop_pass is not None:
            for index in range(1, self.plan.loops + 1):
                hidden = self.loop_pass(self, hidden, rotary, index, mask)
        return hidden, context

    def add_residual(self, out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor) -> Tensor:
        """residual + dropout(out + bias), or of its norm, as after the ordinary attention. Shapes [S, B, D]."""
        combine = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        with self.bias_dropout_add_exec_handler():
            return combine(out_with_bias, residual, self.hidden_dropout)


def _sum(norm: Module | None, scale: float | None) -> Callable[[bool, bool], Callable[..., Tensor]]:
    """``get_bias_dropout_add`` with what is added normalised by ``norm``, its bias included, and times ``scale``."""
    if norm is None and scale is None:
        return get_bias_dropout_add

    def get(training: bool, fused: bool) -> Callable[..., Tensor]:
        combine = get_bias_dropout_add(training, fused)

        def changed(out_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
            out, bias = out_with_bias
            if norm is not None:
                out, bias = norm(out if bias is None else out + bias), None
            if scale is not None:
                out, bias = out * scale, None if bias is None else bias * scale
            return combine((out, bias), residual, prob)

        return changed

    return get
