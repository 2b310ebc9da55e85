"""Validation loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_sgt.model.apply_plan import begin_step
from megatron_sgt.parallel.collectives import mean_over_data_parallel
from megatron_sgt.parallel.groups import ParallelGroups


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches: Iterable[dict[str, Tensor]], groups: ParallelGroups) -> float:
    """Mean cross-entropy in nats per token over this evaluation's micro-batches on all ranks; collective.

    The model is put into evaluation mode and back. NaN without a single batch.
    """
    was_training = model.training
    begin_step(model)
    model.eval()
    losses = [
        model(**{k: v.to(groups.device, non_blocking=True) for k, v in batch.items()}).float() for batch in batches
    ]
    model.train(was_training)
    if not losses:
        return math.nan
    return float(mean_over_data_parallel(torch.stack(losses).mean(), groups))


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows; NaN stays NaN."""
    return math.inf if loss >= 700 else math.exp(loss)
