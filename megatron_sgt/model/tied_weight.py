"""The weight that the embedding on the first stage of a pipeline and the output layer on the last one share.

It is a parameter of the first stage alone: one owner for norm, optimizer and checkpoint. The last stage borrows it:

* before each step, and each evaluation, it is broadcast to the last stage, which holds it outside of its parameters;
* there the gradients of the micro-batches add up in fp32, and go back when all its backward passes are done;
* in the last backward pass of the first stage they are added to the embedding's own gradient, before the optimizer
  sees it. (Two copies with summed gradients would be right without ZeRO and silently wrong with its stage 2.)

The two stages talk over a group of their own (Megatron-Core's embedding group), in which nothing else is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_sgt.parallel.groups import ParallelGroups


class TiedWeight:
    """The shared weight as this rank's stage sees it; a stage between the first and the last only passes by.

    Building it takes the weight out of the output layer of ``chunks``, and attaches itself to the embedding's.
    """

    def __init__(self, chunks: Sequence[GPTModel], groups: ParallelGroups) -> None:
        self._lender, self._borrower = groups.is_first_stage, groups.is_last_stage
        self._source = groups.rank_at(0, groups.dp_rank, groups.tp_rank)
        self._target = groups.rank_at(groups.pp_size - 1, groups.dp_rank, groups.tp_rank)
        self._group = parallel_state.get_embedding_group(check_initialized=False)
        self._takes_gradient = False
        self._value: Tensor
        self._gradient: Tensor | None = None
        if self._lender:
            self._weight = chunks[0].embedding.word_embeddings.weight
            self._weight.register_hook(self._add_returned)
        elif self._borrower:
            last = chunks[-1]
            self._value = torch.zeros_like(last.output_layer.weight, requires_grad=False)
            self._in_graph = torch.zeros((), device=self._value.device, requires_grad=True)
            del last.output_layer.weight
            last.output_layer.register_parameter("weight", None)
            last.share_embeddings_and_output_weights = True
            last.shared_embedding_or_output_weight = self._borrowed

    def lend(self) -> None:
        """Bring the weight to the last stage; collective. The optimizer has changed it."""
        if self._lender:
            dist.broadcast(self._weight.detach(), self._source, group=self._group)
        elif self._borrower:
            dist.broadcast(self._value, self._source, group=self._group)
            self._gradient = None

    def expect_gradient(self, expected: bool) -> None:
        """Tell the first stage whether its next backward pass is its last one of the step."""
        self._takes_gradient = expected

    def give_back(self) -> None:
        """Return the gradient of the step from the last stage, whose backward passes are done."""
        if self._borrower and not self._lender:
            assert self._gradient is not None, "no backward pass went through the output layer"
            dist.broadcast(self._gradient.contiguous(), self._target, group=self._group)
            self._gradient = None

    def _borrowed(self) -> Tensor:
        return _Borrowed.apply(self._in_graph, self)

    def _collect(self, gradient: Tensor) -> None:
        self._gradient = gradient.float() if self._gradient is None else self._gradient + gradient

    def _add_returned(self, gradient: Tensor) -> Tensor | None:
        if not self._takes_gradient:
            return None
        self._takes_gradient = False
        returned = torch.empty_like(gradient, dtype=torch.float32)
        dist.broadcast(returned, self._target, group=self._group)
        return (gradient + returned).to(gradient.dtype)


class _Borrowed(torch.autograd.Function):
    """The borrowed weight out; its gradient is collected and ends here."""

    @staticmethod
    def forward(ctx: Any, in_graph: Tensor, tied: TiedWeight) -> Tensor:
        ctx.tied = tied
        return tied._value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.tied._collect(gradients[0])
        return None, None
