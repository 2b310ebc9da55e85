"""Rotary position embedding: rotation of the two halves of a head by angles that grow with the position.

    rotate(x)[i, b, n] = (x1 cos_i − x2 sin_i, x2 cos_i + x1 sin_i),   x = (x1, x2)

where positions begin again in each document, cos_ib and sin_ib of its own.

(arXiv 2104.09864, in the layout of Hugging Face and Megatron-Core: halves, not pairs.) ``rotate`` is the definition;
``rotate_heads`` is the same for queries and keys of a whole layer, which torch.compile turns into one kernel. Done
operation by operation it takes about six passes over each of them in either direction; where nothing is compiled,
``rotate_halves`` does it without the copies, with Megatron-Core's values and gradients bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.ops.documents import Documents


@dataclass(frozen=True)
class Rotary:
    """cos and sin of the rotary angles, times the attention factor of YaRN, fp32 (fp64 for fp64 angles).

    [S, H / 2], the same for all sequences, or [S, B, H / 2].
    """

    cos: Tensor
    sin: Tensor

    def of_documents(self, documents: Documents) -> Rotary:
        """[S, B, H / 2] from [S, H / 2]: positions are counted from the start of each document."""
        starts = documents.starts
        places = (torch.arange(starts.shape[1], device=starts.device) - starts).t().contiguous()
        return Rotary(self.cos[places], self.sin[places])


def rotary_table(angles: Tensor, factor: float = 1.0) -> Rotary:
    """From Megatron's angles [S, 1, 1, H], whose halves are equal. ``factor``: of cos and sin."""
    half = angles[:, 0, 0, : angles.shape[-1] // 2]
    half = half if half.dtype == torch.float64 else half.float()
    cos, sin = half.cos().contiguous(), half.sin().contiguous()
    return Rotary(cos, sin) if factor == 1.0 else Rotary(cos * factor, sin * factor)


class RotaryTables:
    """The table of the angles that Megatron-Core hands to every layer: one for all layers, the same in every step.

    That of documents is one for all layers of a micro-batch.
    """

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self._angles: Tensor | None = None
        self._table: Rotary | None = None
        self._documents: Documents | None = None
        self._restarted: Rotary | None = None

    def of(self, angles: Tensor, documents: Documents | None = None) -> Rotary:
        """The table of ``angles``, computed when they are another tensor than last time.

        ``documents``: those in which positions begin again; [S, B, H / 2], computed when they are other ones.
        """
        if self._table is None or self._angles is not angles:
            self._angles, self._table = angles, rotary_table(angles, self.factor)
            self._documents = None
        if documents is None:
            return self._table
        if self._restarted is None or self._documents is not documents:
            self._documents, self._restarted = documents, self._table.of_documents(documents)
        return self._restarted


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads [S, B, *, H] by a table's cos and sin, in the type of ``heads``."""
    cos, sin = (_per_head(t.to(heads)) for t in (cos, sin))
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _per_head(t: Tensor) -> Tensor:
    """[S, H / 2] -> [S, 1, 1, H / 2], [S, B, H / 2] -> [S, B, 1, H / 2]."""
    return t[:, None, None] if t.dim() == 2 else t[:, :, None]


def rotate_halves(heads: Tensor, rotary: Rotary) -> Tensor:
    """``rotate`` in the type of ``heads`` [S, B, *, H]; backward needs only the table."""
    return _Rotation.apply(heads, rotary.cos, rotary.sin)


class _Rotation(torch.autograd.Function):
    """The gradient of a rotation, scaled or not, is the rotation back with the same table."""

    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin, back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, back=True), None, None


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """Each half is written directly to its place. No multiply-add: it would round once less than Megatron-Core does."""
    cos, sin = (_per_head(t.to(heads)) for t in (cos, sin))
    first, second = heads.chunk(2, dim=-1)
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    (out_first, out_second), product = out.chunk(2, dim=-1), second * sin
    torch.mul(first, cos, out=out_first)
    torch.mul(second, cos, out=out_second)
    out_first.add_(product) if back else out_first.sub_(product)
    torch.mul(first, sin, out=product)
    out_second.sub_(product) if back else out_second.add_(product)
    return out


def rotate_heads(query: Tensor, key: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Queries [S, B, N, H] and keys [S, B, G, H], rotated in fp32 (fp64) and rounded once, as one compiled function.

    Compiled at the first call; backward needs only the table.
    """
    return _compiled()(query, key, rotary.cos, rotary.sin)


@cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_rotate_both)


def _rotate_both(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    wide = (rotate(t if t.dtype == torch.float64 else t.float(), cos, sin) for t in (query, key))
    turned_query, turned_key = wide
    return turned_query.to(query.dtype), turned_key.to(key.dtype)
