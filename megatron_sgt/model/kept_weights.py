"""The kept heads' weights on every tensor-parallel rank: fetched once per optimizer step, paid back once.

For balanced looping each rank needs all kept heads' rows of W_qkv (and of its bias) and columns of W_o, a few
MB, of which it owns some, all or none. ``KeptWeights.get`` returns them as differentiable tensors:

* forward: the owners' rows are summed into one buffer by an all-reduce in the first use of a step, and kept;
* backward: gradients of the micro-batches add up in fp32 here, and the last micro-batch hands each owner the
  rows that are its own, after one all-reduce where the ranks saw different tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.parallel.head_layout import HeadLayout


@dataclass(frozen=True)
class KeptRows:
    """Where this rank's kept rows lie: in its own weights, and among all kept rows.

    ``own``/``all_``: equally long; row ``own[i]`` of the local W_qkv is row ``all_[i]`` of the kept W_qkv; the same
    for ``own_columns``/``all_columns`` of W_o. ``count``/``columns``: sizes of the kept weights. ``kv_slot``: as in
    ``KeptHeads``, for all kept heads; ``head_ids``: their global ids; ``heads``, ``groups``: how many there are.
    """

    own: Tensor
    all_: Tensor
    own_columns: Tensor
    all_columns: Tensor
    count: int
    columns: int
    kv_slot: Tensor
    head_ids: Tensor
    heads: int
    groups: int


def kept_rows(kept_heads: tuple[int, ...], layout: HeadLayout, device: torch.device) -> KeptRows:
    """Work out the rows of ``kept_heads`` (global ids) for the rank that ``layout`` describes."""
    whole = HeadLayout(layout.num_heads, layout.num_groups, layout.head_dim)
    kept, mine = whole.local(kept_heads), layout.local(kept_heads)
    size = layout.head_dim
    heads = [i for i, head in enumerate(kept.heads) if layout.owner(head) == layout.tp_rank]
    first_group = layout.tp_rank * layout.groups_per_rank
    groups = [kept.groups.index(first_group + group) for group in mine.groups]
    blocks = [*heads, *(len(kept.heads) + g for g in groups)]
    blocks += [len(kept.heads) + len(kept.groups) + g for g in groups]

    def index(values: Any) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long, device=device)

    return KeptRows(
        own=index(mine.qkv_rows),
        all_=index(row for block in blocks for row in range(block * size, (block + 1) * size)),
        own_columns=index(mine.proj_columns),
        all_columns=index(c for head in heads for c in range(head * size, (head + 1) * size)),
        count=len(kept.qkv_rows),
        columns=len(kept.proj_columns),
        kv_slot=index(kept.kv_slot),
        head_ids=index(kept.heads),
        heads=len(kept.heads),
        groups=len(kept.groups),
    )


class KeptWeights:
    """One layer's kept weights on this rank; see the module's text.

    ``partial_gradients``: whether the ranks' gradients of W_qkv and W_o are parts of a sum (they saw different
    tokens: sequence parallelism) or whole already (replicated activations).
    """

    def __init__(self, rows: KeptRows, group: dist.ProcessGroup, partial_gradients: bool) -> None:
        self.rows = rows
        self.group = group
        self.partial_gradients = partial_gradients
        self.last_micro_batch = True
        self._weights: Tensor | None = None
        self._gradient: Tensor | None = None

    def begin_step(self) -> None:
        """Forget the fetched weights (the optimizer has changed them) and unfinished gradients."""
        self._weights = None
        self._gradient = None

    def get(self, qkv: Tensor, bias: Tensor | None, proj: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Kept W_qkv [rows, D], its bias [rows] or None, kept W_oᵀ [columns, D]; collective on first use.

        Args:
            qkv, bias, proj: this rank's own fused weight [.., D], bias and output projection [D, ..].
        """
        packed: Tensor = _Fetch.apply(qkv, bias, proj, self)
        rows, hidden = self.rows, qkv.shape[1]
        weights, out, kept_bias = packed.split(
            [rows.count * hidden, rows.columns * hidden, 0 if bias is None else rows.count]
        )
        return (
            weights.view(rows.count, hidden),
            None if bias is None else kept_bias,
            out.view(rows.columns, hidden),
        )

    def fetch(self, qkv: Tensor, bias: Tensor | None, proj: Tensor) -> Tensor:
        """All kept weights in one flat tensor, from the owners by one all-reduce per step."""
        if self._weights is None:
            rows = self.rows
            weights = qkv.new_zeros(rows.count, qkv.shape[1])
            weights[rows.all_] = qkv.detach()[rows.own]
            out = proj.new_zeros(rows.columns, proj.shape[0])
            out[rows.all_columns] = proj.detach()[:, rows.own_columns].t()
            parts = [weights.flatten(), out.flatten()]
            if bias is not None:
                kept = bias.new_zeros(rows.count)
                kept[rows.all_] = bias.detach()[rows.own]
                parts.append(kept)
            self._weights = torch.cat(parts)
            dist.all_reduce(self._weights, group=self.group)
        return self._weights.detach()

    def add_gradient(self, gradient: Tensor) -> Tensor | None:
        """Add one micro-batch's gradient; the step's whole gradient in its last micro-batch, else None."""
        total = gradient.float() if self._gradient is None else self._gradient + gradient
        if not self.last_micro_batch:
            self._gradient = total
            return None
        self._gradient = None
        if self.partial_gradients:
            dist.all_reduce(total, group=self.group)
        return total


class _Fetch(torch.autograd.Function):
    """Owner's weights in, everybody's kept weights out; gradients the other way."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor | None, proj: Tensor, kept: KeptWeights) -> Tensor:
        """See ``KeptWeights.get``."""
        ctx.kept, ctx.shapes = kept, (qkv.shape, None if bias is None else bias.shape, proj.shape)
        ctx.dtype = qkv.dtype
        return kept.fetch(qkv, bias, proj)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The rows of the summed gradient that this rank owns, in dense gradients of its weights."""
        kept: KeptWeights = ctx.kept
        total = kept.add_gradient(grad)
        rows = kept.rows
        if total is None or not len(rows.own):
            return None, None, None, None
        (qkv_shape, bias_shape, proj_shape), hidden = ctx.shapes, ctx.shapes[0][1]
        weights, out, bias = total.split(
            [rows.count * hidden, rows.columns * hidden, 0 if bias_shape is None else rows.count]
        )
        qkv_grad = weights.new_zeros(qkv_shape, dtype=ctx.dtype)
        qkv_grad[rows.own] = weights.view(rows.count, hidden)[rows.all_].to(ctx.dtype)
        proj_grad = out.new_zeros(proj_shape, dtype=ctx.dtype)
        proj_grad[:, rows.own_columns] = out.view(rows.columns, hidden)[rows.all_columns].t().to(ctx.dtype)
        bias_grad = None
        if bias_shape is not None:
            bias_grad = bias.new_zeros(bias_shape, dtype=ctx.dtype)
            bias_grad[rows.own] = bias[rows.all_].to(ctx.dtype)
        return qkv_grad, bias_grad, proj_grad, None
