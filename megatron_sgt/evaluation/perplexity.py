"""Validation loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.model.apply_plan import begin_step
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.model.pipeline_forward import forward_only, from_last_stage
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
    whole: Any = getattr(model, "module", model)  # of an engine
    if groups.pp_size > 1:
        mean: Tensor | None = _through_pipeline(whole, batches, groups)
    else:
        mean = _mean([model(**whole.inputs(batch, groups.device)) for batch in batches])
    model.train(was_training)
    return math.nan if mean is None else float(mean_over_data_parallel(mean, groups))


def _mean(losses: list[Tensor]) -> Tensor | None:
    return torch.stack([loss.float() for loss in losses]).mean() if losses else None


def _through_pipeline(model: LanguageModel, batches: Iterable[dict[str, Tensor]], groups: ParallelGroups) -> Tensor:
    """The mean loss of ``batches``, on every stage."""
    assert model.pipeline is not None

    def forward(chunk: int, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**model.inputs(batch, groups.device, chunk), chunk=chunk)

    mean = _mean(forward_only(model.pipeline, forward, batches))
    return from_last_stage(torch.full((), math.nan, device=groups.device) if mean is None else mean, groups)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows; NaN stays NaN."""
    return math.inf if loss >= 700 else math.exp(loss)
