"""The forward and backward passes of a step in a pipeline: Megatron-Core's schedule, DeepSpeed's engine around each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from torch import Tensor

from megatron_sgt.compat.megatron_pipeline import backward_from, run_schedule
from megatron_sgt.data.loader import MicroBatch
from megatron_sgt.engine.finite import guard
from megatron_sgt.engine.token_weights import weighted
from megatron_sgt.model.apply_plan import mark_micro_batch
from megatron_sgt.model.documents import counted
from megatron_sgt.model.pipeline_forward import from_last_stage
from megatron_sgt.parallel.groups import ParallelGroups


def forward_backward(
    engine: deepspeed.DeepSpeedEngine, batches: Sequence[MicroBatch], pieces: int, groups: ParallelGroups
) -> Tensor:
    """Compute the gradients of a step, ready for ``engine.step()``; collective over the pipeline.

    Args:
        batches: all micro-batches of this data-parallel rank, on every stage. pieces: see ``data.pieces.cut``.

    Returns:
        The mean loss of the micro-batches, on every stage.
    """
    passes = _Passes(engine, batches, pieces, groups)
    tied = engine.module.pipeline.tied
    if tied is not None:
        tied.lend()
    size, length = batches[0]["tokens"].shape
    shape = (size * pieces, length // pieces)
    run_schedule(engine.module.chunks, passes.forward, batches, shape, groups.device, passes.backward)
    if tied is not None:
        tied.give_back()
    losses = passes.losses
    mean = torch.stack(losses).float().mean() if losses else torch.zeros((), device=groups.device)
    return from_last_stage(mean, groups)


class _Passes:
    """The forward and backward passes of one step on this rank, counted per chunk."""

    def __init__(self, engine: Any, batches: Sequence[MicroBatch], pieces: int, groups: ParallelGroups) -> None:
        self.engine, self.pieces, self.groups = engine, pieces, groups
        self.model = engine.module
        self.losses: list[Tensor] = []
        # Of the micro-batches by identity: a schedule hands them on in an order of its own.
        self._weights = {id(one): weight for one, weight in weighted(batches, self.model.rules.weighted, groups)}
        self._left = [len(batches)] * len(self.model.chunks)
        self._in_flight: dict[int, int] = {}  # an output is alive until its backward pass, so that its id is unique

    def forward(self, chunk: int, batch: MicroBatch) -> Tensor:
        gpt, meter = self.model.chunks[chunk], self.model.meter
        inputs = self.model.inputs(batch, self.groups.device, chunk, self.pieces)
        weight = self._weights[id(batch)] if gpt.post_process else {}
        output = self.engine(**inputs, **weight, chunk=chunk)
        guard(output, meter)
        meter.end_micro_batch(whole=gpt is self.model.chunks[-1], **counted(inputs))
        if gpt.post_process:
            self.losses.append(output.detach())
            output = output.clone()  # the schedule divides it in place
        self._in_flight[id(output)] = chunk
        return output

    def backward(self, output: Tensor, gradient: Tensor | None) -> None:
        chunk = self._in_flight.pop(id(output))
        self._left[chunk] -= 1
        mark_micro_batch(self.model.chunks[chunk], last=self._left[chunk] == 0)
        last = not any(self._left)
        if self.model.pipeline.tied is not None:
            self.model.pipeline.tied.expect_gradient(last)
        # DeepSpeed expects a forward pass before each backward pass, and clears this there.
        if hasattr(self.engine.optimizer, "clear_backward_seen_flag"):
            self.engine.optimizer.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(last)
        with self.model.meter.paused():
            self.engine.backward(backward_from(output, gradient), scale_wrt_gas=False)
