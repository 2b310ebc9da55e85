"""Megatron-Core's pipeline schedules (1F1B, interleaved), with a backward pass of the caller and on any device.

The schedules are functions of ``megatron.core.pipeline_parallel.schedules`` that find two things in their module while
they run: ``backward_step``, which is replaced so that an engine can act around each backward pass, and ``torch``, of
which they want a counter on a GPU: on a CPU it gets one there. Both are put back when a schedule ends.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules
from torch import Tensor

Batch = TypeVar("Batch")
Backward = Callable[[Tensor, Tensor | None], None]
"""(output of a chunk, its gradient): runs the backward pass. The last chunk's output is the loss over the number of
micro-batches, and its gradient None. An output that was sent may hold no data any more."""


def run_schedule(
    chunks: Sequence[GPTModel],
    forward: Callable[[int, Batch], Tensor],
    batches: Sequence[Batch],
    shape: tuple[int, int],
    device: torch.device,
    backward: Backward | None = None,
) -> None:
    """Send ``batches`` through the pipeline, this rank's chunks in turn; collective over its pipeline group.

    Args:
        forward: (number of the chunk on this rank, micro-batch) -> the chunk's output. Its input has been set.
        batches: all micro-batches of a step, on every stage; interleaved a multiple of the stages.
        shape: [B, S] of every micro-batch, S whole.
        backward: see ``Backward``; None: forward only.
    """

    def forward_step(micro_batches: Iterator[Batch], chunk: GPTModel) -> tuple[Tensor, Callable[..., Any]]:
        return forward(chunk.vp_stage or 0, next(micro_batches)), _loss

    iterators = [iter(batches) for _ in chunks]
    with _adapted(backward, device):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators,
            model=list(chunks),
            num_microbatches=len(batches),
            seq_length=shape[1],
            micro_batch_size=shape[0],
            forward_only=backward is None,
            collect_non_loss_data=backward is None,
        )
    for one in chunks:
        one.set_input_tensor(None)  # it would keep the last micro-batch's input


def _loss(output: Tensor, non_loss_data: bool = False) -> Any:
    """What the schedules make of the last chunk's output: they divide a loss in place, and leave other data alone."""
    return None if non_loss_data else (output, None)


@contextlib.contextmanager
def _adapted(backward: Backward | None, device: torch.device) -> Iterator[None]:
    replaced: dict[str, Any] = {"backward_step": _backward_step(backward)} if backward is not None else {}
    if device.type == "cpu":
        replaced["torch"] = _TorchOnCPU()
    before = {name: getattr(schedules, name) for name in replaced}
    for name, value in replaced.items():
        setattr(schedules, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(schedules, name, value)


def _backward_step(backward: Backward) -> Callable[..., Any]:
    """``backward`` under the signature that the schedules call: with the model's type before 0.19, without it since.

    One schedule hands over lists of one tensor, the other tensors.
    """

    def step(inputs: Any, outputs: Any, gradients: Any, *_: Any) -> Any:
        received, (output,), (gradient,) = map(_as_list, (inputs, outputs, gradients))
        for tensor in received:
            if tensor is not None:
                tensor.retain_grad()
        backward(output, gradient)
        found = [None if tensor is None else tensor.grad for tensor in received]
        return found if isinstance(inputs, list) else found[0]

    return step


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


class _TorchOnCPU:
    """``torch``, but zeros that are wanted on a GPU are made on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **options)


def backward_from(output: Tensor, gradient: Tensor | None) -> Tensor:
    """A scalar whose backward pass gives ``output`` the gradient ``gradient``; None: that of the scalar itself.

    The values of ``output`` are not needed.
    """
    return _Received.apply(output, gradient)


class _Received(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor | None) -> Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *ones: Tensor) -> tuple[Tensor, None]:
        return ones[0] if ctx.gradient is None else ctx.gradient, None
