"""Chooses the way in which a layer loops, once for each plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan
from megatron_sgt.model.balanced_loop import BalancedLoop
from megatron_sgt.model.fused_pass import FusedLoop
from megatron_sgt.model.head_loop import DenseLoop, KeptLoop, LoopPass, SparseLoop
from megatron_sgt.model.kept_weights import kept_weights
from megatron_sgt.ops.head_blocks import HeadBlocks, head_blocks, whole_blocks
from megatron_sgt.planning.loop_cost import choose_loop_method


@dataclass(frozen=True)
class LoopOptions:
    """What, besides the plan, decides the way of looping; constant during a run.

    Args:
        layout: this rank's share of the heads.
        balanced: spread kept heads over the tensor-parallel ranks instead of looping them at their owners.
        sharded: whether activations are split over those ranks (sequence parallelism).
        fused: loop kept heads through the fused operations (see ``loop_backend``).
        whole_projection: see ``SparseLoop``; then nothing is balanced or fused.
    """

    layout: HeadLayout
    balanced: bool
    sharded: bool
    fused: bool
    whole_projection: bool = False

    @classmethod
    def of(cls, config: Config, layout: HeadLayout, fused: bool) -> LoopOptions:
        balanced = layout.tp_size > 1 and choose_loop_method(config)[0] == "balanced"
        return cls(layout, balanced, config.parallel.sequence_parallel, fused, config.model.norms_all_heads)

    @property
    def fuses_projections(self) -> bool:
        """Whether the projections are fused too; otherwise only the attention is."""
        return self.fused and ((self.balanced and self.sharded) or self.layout.tp_size == 1)

    def blocks(self, kept_heads: tuple[int, ...]) -> HeadBlocks:
        """The kept heads that this rank loops, on the host."""
        return (whole_blocks if self.balanced else head_blocks)(self.layout, kept_heads)


def choose_loop_pass(plan: LayerPlan, options: LoopOptions, group: dist.ProcessGroup) -> LoopPass | None:
    """How a layer executes ``plan`` (host tensors) over the tensor-parallel ``group``; None if no heads loop."""
    if plan.phase == "off":
        return None
    layout = options.layout
    if plan.phase == "window":
        gates = [1.0 if head in plan.kept_heads else plan.other_gate for head in layout.owned_heads]
        return DenseLoop(torch.tensor(gates, dtype=torch.float32))
    blocks = options.blocks(plan.kept_heads)
    kept: KeptLoop = SparseLoop(blocks, options.fused, options.whole_projection)
    if options.balanced:
        weights = kept_weights(plan.kept_heads, layout, group, partial_gradients=options.sharded)
        kept = BalancedLoop(blocks, options.fused, weights, layout, options.sharded)
    return FusedLoop(kept) if options.fuses_projections else kept
