"""A loop pass of kept heads in three fused operations (``ops.fused_loop``); ``head_loop`` is its definition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from megatron_sgt.model.documents import DocumentMask
from megatron_sgt.model.head_loop import KeptLoop, LoopingLayer, LoopPass
from megatron_sgt.model.linear import inside
from megatron_sgt.ops import fused_loop
from megatron_sgt.ops.rotary import Rotary


@dataclass(eq=False)
class FusedLoop(LoopPass):
    """``kept``, with its projections fused.

    In place of ``SparseLoop`` on one tensor-parallel rank, or of ``BalancedLoop`` under sequence parallelism. Weights
    are used inside calls of the modules that own them, one within the other, as ZeRO-3 needs it (see ``linear.py``).
    """

    kept: KeptLoop

    def __call__(
        self, layer: LoopingLayer, x: Tensor, rotary: Rotary, index: int, mask: DocumentMask | None = None
    ) -> Tensor:
        attention, kept = layer.self_attention, self.kept
        modules = [layer.input_layernorm, attention.linear_qkv]
        if attention.q_layernorm is not None:
            modules += [attention.q_layernorm, attention.k_layernorm]
        eps = layer.input_layernorm.eps
        use = partial(self._project_in, rotary=kept.positions(rotary), eps=eps, index=index)
        query, key, value, residual = inside(modules, x, use)
        heads = kept.attention(layer, query, key, value, index, mask)
        if layer.branch_scale is not None:
            heads = heads * layer.branch_scale
        project_out = partial(self._project_out, residual=residual, index=index)
        out, bias = attention.linear_proj(heads, use=project_out)
        if bias is not None and layer.branch_scale is not None:
            bias = bias * layer.branch_scale
        return out if bias is None else out + bias

    def begin_step(self) -> None:
        self.kept.begin_step()

    def mark_micro_batch(self, last: bool) -> None:
        self.kept.mark_micro_batch(last)

    def _project_in(
        self,
        x: Tensor,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        *,
        rotary: Rotary,
        eps: float,
        index: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight, bias = self.kept.projection(weight, bias, index)
        head_norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        return fused_loop.project_in(x, norm_weight, weight, bias, head_norms, self.kept.blocks, rotary, eps)

    def _project_out(self, heads: Tensor, weight: Tensor, _: Tensor | None, *, residual: Tensor, index: int) -> Tensor:
        weight = self.kept.output_weight(weight, index)
        return fused_loop.project_out(heads, residual, weight, self.kept.blocks)
