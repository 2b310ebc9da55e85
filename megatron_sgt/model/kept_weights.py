"""The kept heads' weights on every tensor-parallel rank: fetched, and their gradients returned, once per step.

For balanced looping each rank needs all kept heads' rows of W_qkv (and of its bias) and columns of W_o, a few
MB, of which it owns some, all or none. A ``KeptSlice`` gives them as differentiable tensors:

* forward: at the first use of a step an all-reduce sums the owners' parts into one buffer, which is kept;
* backward: gradients of the micro-batches add up in fp32 here, and in the last micro-batch each owner takes its
  part, after one all-reduce where the ranks saw different tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout


@dataclass(eq=False)
class KeptSlice:
    """The kept part of one parameter: ``count`` indices along ``dim``, this rank's among them.

    Args:
        own, among: equally long; index ``own[i]`` of this rank's parameter is index ``among[i]`` of the kept part.
        partial_gradients: whether the ranks' gradients are parts of a sum (they saw different tokens: sequence
            parallelism) or whole already (replicated activations).
    """

    dim: int
    count: int
    own: Tensor
    among: Tensor
    group: dist.ProcessGroup
    partial_gradients: bool
    last_micro_batch: bool = field(default=True, init=False)
    _fetched: Tensor | None = field(default=None, init=False)
    _in_graph: Tensor | None = field(default=None, init=False)
    _gradient: Tensor | None = field(default=None, init=False)

    def begin_step(self) -> None:
        """Forget what was fetched (the optimizer has changed it) and unfinished gradients."""
        self._fetched = None
        self._in_graph = None
        self._gradient = None

    def get(self, parameter: Tensor, index: int) -> Tensor:
        """The kept part of ``parameter`` over all ranks, ``count`` long along ``dim``; collective on first use.

        Args:
            index: number of the loop pass, from 1. All passes of one forward share what the first one got, so
                that their gradients are summed before they are returned.
        """
        if index == 1 or self._in_graph is None:
            self._in_graph = _Fetch.apply(parameter, self)
        return self._in_graph

    def fetch(self, parameter: Tensor) -> Tensor:
        """The kept part from its owners, by one all-reduce per step."""
        if self._fetched is None:
            shape = list(parameter.shape)
            shape[self.dim] = self.count
            own = parameter.detach().index_select(self.dim, self.own)
            self._fetched = parameter.new_zeros(shape).index_copy_(self.dim, self.among, own)
            dist.all_reduce(self._fetched, group=self.group)
        return self._fetched.detach()

    def return_gradient(self, gradient: Tensor, shape: torch.Size) -> Tensor | None:
        """Add one micro-batch's gradient of the kept part.

        Returns:
            This rank's dense gradient of the step, of ``shape``, in the last micro-batch; before it, and on a
            rank that owns nothing of the kept part, None.
        """
        total = gradient.float() if self._gradient is None else self._gradient + gradient
        if not self.last_micro_batch:
            self._gradient = total
            return None
        self._gradient = None
        if self.partial_gradients:
            total = total.contiguous()
            dist.all_reduce(total, group=self.group)
        if not len(self.own):
            return None
        mine = total.index_select(self.dim, self.among).to(gradient.dtype)
        return gradient.new_zeros(shape).index_copy_(self.dim, self.own, mine)


class _Fetch(torch.autograd.Function):
    """The owners' weights in, the kept weights on every rank out; gradients the other way."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, kept: KeptSlice) -> Tensor:
        ctx.kept, ctx.shape = kept, parameter.shape
        return kept.fetch(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return ctx.kept.return_gradient(grad, ctx.shape), None


@dataclass(frozen=True)
class KeptWeights:
    """One layer's kept weights in the order of ``whole_blocks``: rows of ``qkv``, ``qkv_bias``, columns of ``proj``."""

    qkv: KeptSlice
    qkv_bias: KeptSlice
    proj: KeptSlice
    group: dist.ProcessGroup

    @property
    def slices(self) -> tuple[KeptSlice, ...]:
        return self.qkv, self.qkv_bias, self.proj


def kept_weights(
    kept_heads: tuple[int, ...],
    layout: HeadLayout,
    group: dist.ProcessGroup,
    partial_gradients: bool,
) -> KeptWeights:
    """Work out the slices of ``kept_heads`` (global ids) for the rank that ``layout`` describes, on the host."""
    kept, mine = replace(layout, tp_size=1, tp_rank=0).local(kept_heads), layout.local(kept_heads)
    heads, groups = len(kept.heads), len(kept.groups)
    first_group = layout.tp_rank * layout.groups_per_rank
    own_heads = [i for i, head in enumerate(kept.heads) if layout.owner(head) == layout.tp_rank]
    own_groups = [kept.groups.index(first_group + member) for member in mine.groups]
    blocks = [*own_heads, *(heads + g for g in own_groups), *(heads + groups + g for g in own_groups)]

    def index(values: Iterable[int]) -> Tensor:
        return torch.tensor(list(values), dtype=torch.long)

    def part(dim: int, count: int, own: Iterable[int], among: Iterable[int]) -> KeptSlice:
        spread = index(b * layout.head_dim + i for b in among for i in range(layout.head_dim))
        return KeptSlice(dim, count, index(own), spread, group, partial_gradients)

    return KeptWeights(
        qkv=part(0, len(kept.qkv_rows), mine.qkv_rows, blocks),
        qkv_bias=part(0, len(kept.qkv_rows), mine.qkv_rows, blocks),
        proj=part(1, len(kept.proj_columns), mine.proj_columns, own_heads),
        group=group,
    )
