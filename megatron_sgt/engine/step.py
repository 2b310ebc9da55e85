"""One optimizer step: forward and backward over the micro-batches, clipping, update; and the count of steps."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import Tensor

from megatron_sgt.engine.finite import guard
from megatron_sgt.engine.pipeline import forward_backward
from megatron_sgt.engine.token_weights import weighted
from megatron_sgt.errors import CheckpointError
from megatron_sgt.model.apply_plan import begin_step, mark_micro_batch
from megatron_sgt.model.documents import counted
from megatron_sgt.parallel.groups import ParallelGroups

Batch = dict[str, Tensor]


@dataclass
class TrainState:
    """Where the run stands: the counters that DeepSpeed does not keep.

    ``step``: applied optimizer steps; ``consumed_samples``: sequences taken from the data order, skipped steps
    included; ``skipped_steps``: steps without a finite gradient, in all and in a row.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    consecutive_skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved counters.

        Raises:
            CheckpointError: one is missing.
        """
        for name in asdict(self):
            if name not in state:
                raise CheckpointError(f"the checkpoint's training state has no {name!r}")
            setattr(self, name, int(state[name]))


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    ``loss``: mean over this rank's micro-batches, a scalar on the device (no synchronisation happened for it), on every
    stage of a pipeline; its mean over data-parallel ranks is that of the step (see ``token_weights``).
    ``grad_norm``: L2 norm over all parameters before clipping; inf or NaN when the update was skipped.
    ``applied``: whether the optimizer took the step (False: a loss, an entropy or a gradient was not finite
    on some rank).
    ``seconds``: wall time of the step, waiting for data included. The loop counts from the end of the step before,
    when the host had read its norm: forward and backward are queued, so that nothing else separates two steps.
    ``loss_scale``: what the loss was multiplied by for the backward pass; None without fp16.
    """

    loss: Tensor
    grad_norm: float
    applied: bool
    lr: float
    seconds: float
    loss_scale: float | None = None


def train_step(
    engine: deepspeed.DeepSpeedEngine,
    batches: Iterable[Batch],
    lr: float,
    clip_grad: float,
    groups: ParallelGroups,
    pieces: int = 1,
) -> StepResult:
    """Run one optimizer step on ``batches`` (one per micro-batch of this rank), each sample cut into ``pieces``."""
    start = time.perf_counter()
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    scale = float(engine.optimizer.loss_scaler.cur_scale) if engine.fp16_enabled() else None
    begin_step(engine.module)
    if groups.pp_size > 1:
        loss = forward_backward(engine, list(batches), pieces, groups)
    else:
        loss = _forward_backward(engine, batches, pieces, groups)
    if engine.zero_optimization_stage() == 0:
        norm = _clip_stage0(engine, clip_grad, groups)
        engine.step()
        applied = math.isfinite(norm)
    else:
        engine.step()
        norm, applied = float(engine.get_global_grad_norm()), engine.was_step_applied()
    return StepResult(loss, norm, applied, lr, time.perf_counter() - start, scale)


def _forward_backward(
    engine: deepspeed.DeepSpeedEngine, batches: Iterable[Batch], pieces: int, groups: ParallelGroups
) -> Tensor:
    """Compute the gradients of a step, ready for its last ``engine.step()``; returns the mean loss."""
    losses: list[Tensor] = []
    model = engine.module
    meter = model.meter
    for batch, weight in weighted(batches, model.rules.weighted, groups):
        if losses:
            engine.step()  # DeepSpeed counts micro-batches with it
        mark_micro_batch(model, last=engine.is_gradient_accumulation_boundary())
        inputs = model.inputs(batch, groups.device, pieces=pieces)
        loss = engine(**inputs, **weight)
        guard(loss, meter)
        meter.end_micro_batch(**counted(inputs))
        with meter.paused():
            engine.backward(loss)
        losses.append(loss.detach())
    return torch.stack(losses).float().mean()


def _clip_stage0(engine: Any, clip_grad: float, groups: ParallelGroups) -> float:
    """Clip the averaged gradients of an unsharded run; without a finite norm, make the step a no-op.

    DeepSpeed's stage 0 reports no norm and would apply a NaN gradient to the weights. Dropping every gradient
    makes torch's optimizers leave weights and moments as they are.
    """
    parameters = [p for p in engine.module.parameters() if p.grad is not None]
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters]
    squares = torch.stack(norms).square()
    owned = [n for n, p in enumerate(parameters) if param_is_not_tensor_parallel_duplicate(p)]
    # The norm counts replicated parameters once; the second sum has every copy, as one may be not finite.
    totals = torch.stack([squares[owned].sum(), squares.sum()])
    if groups.tp_size * groups.pp_size > 1:
        dist.all_reduce(totals, group=groups.mp_group)
    once, everything = totals.sqrt().tolist()
    norm = once if math.isfinite(everything) else everything
    if not math.isfinite(norm):
        for parameter in parameters:
            parameter.grad = None
    elif 0 < clip_grad < norm:
        for parameter in parameters:
            parameter.grad.mul_(clip_grad / (norm + 1e-6))
    return norm
