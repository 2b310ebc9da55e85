"""1F1B written out by hand, to test the schedules against: blocking receives, messages one by one, no Megatron-Core.

``forward_backward`` takes the place of ``engine.pipeline.forward_backward``, one chunk per stage, untied weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.model.apply_plan import mark_micro_batch
from megatron_sgt.parallel.groups import ParallelGroups


def forward_backward(engine: Any, batches: Sequence[dict[str, Tensor]], pieces: int, groups: ParallelGroups) -> Tensor:
    """Gradients of a step of uncut micro-batches on every stage; returns their mean loss."""
    model, left = engine.module, len(batches)
    sent, losses = [], []
    waiting: deque[tuple[Tensor | None, Tensor]] = deque()
    (gpt,) = model.chunks
    before, after = (
        groups.rank_at((groups.pp_rank + n) % groups.pp_size, groups.dp_rank, groups.tp_rank) for n in (-1, 1)
    )
    size, length = batches[0]["tokens"].shape
    parts = groups.tp_size if gpt.config.sequence_parallel else 1
    shape = (length // parts, size, gpt.config.hidden_size)

    def received(source: int) -> Tensor:
        hidden = torch.empty(shape, dtype=gpt.config.params_dtype)
        dist.recv(hidden, source)
        return hidden

    def forward(batch: dict[str, Tensor]) -> None:
        hidden = None if groups.is_first_stage else received(before).requires_grad_()
        gpt.set_input_tensor(hidden)
        names = ["tokens", "position_ids"] * groups.is_first_stage + ["labels", "loss_mask"] * groups.is_last_stage
        output = engine(**{name: batch[name] for name in names})
        model.meter.end_micro_batch()
        waiting.append((hidden, output))
        if groups.is_last_stage:
            losses.append(output.detach())
        else:
            sent.append(dist.isend(output.detach(), after))

    def backward() -> None:
        hidden, output = waiting.popleft()
        nonlocal left
        left -= 1
        scalar = output / len(batches) if groups.is_last_stage else (output * received(after)).sum()
        mark_micro_batch(model, last=left == 0)
        if hasattr(engine.optimizer, "clear_backward_seen_flag"):
            engine.optimizer.clear_backward_seen_flag()
        engine.set_gradient_accumulation_boundary(left == 0)
        with model.meter.paused():
            engine.backward(scalar, scale_wrt_gas=False)
        if hidden is not None:
            sent.append(dist.isend(hidden.grad, before))

    for number, batch in enumerate(batches):
        forward(batch)
        if number >= groups.pp_size - groups.pp_rank - 1:
            backward()
    while waiting:
        backward()
    for message in sent:
        message.wait()
    gpt.set_input_tensor(None)
    loss = torch.stack(losses).mean() if losses else torch.zeros(())
    dist.broadcast(loss, groups.rank_at(groups.pp_size - 1, groups.dp_rank, groups.tp_rank), groups.pp_group)
    return loss
