"""Validation loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_sgt.model.apply_plan import begin_step
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.model.pipeline_forward import forward_only, from_last_stage
from megatron_sgt.parallel.collectives import any_rank, mean_over_data_parallel
from megatron_sgt.parallel.groups import ParallelGroups

Batch = dict[str, Tensor]


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches: Iterable[Batch], groups: ParallelGroups) -> float:
    """Mean cross-entropy in nats per token over this evaluation's micro-batches on all ranks; collective.

    Every token counts alike whose ``loss_mask`` is 1, in whichever micro-batch it is. The model is put into evaluation
    mode and back. NaN without a single batch.
    """
    was_training = model.training
    begin_step(model)
    model.eval()
    counted = _Counted(batches)
    whole: Any = getattr(model, "module", model)  # of an engine
    if groups.pp_size > 1:
        losses = _through_pipeline(whole, counted, groups)
    else:
        losses = _stack([model(**whole.inputs(batch, groups.device)) for batch in counted])
    model.train(was_training)
    if any_rank(counted.masked, groups):
        weights = torch.tensor(counted.tokens, dtype=torch.float64)
        sums = torch.stack([(losses.cpu().double() * weights).sum(), weights.sum()]).to(groups.device)
        total, tokens = mean_over_data_parallel(sums, groups).tolist()
        return total / tokens if tokens else math.nan
    return float(mean_over_data_parallel(losses.mean(), groups)) if len(losses) else math.nan


class _Counted:
    """Hands on the micro-batches of one pass and counts the tokens of each whose loss counts, while on the host."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches
        self.tokens: list[float] = []
        self.masked = False

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            if "loss_mask" in batch:
                mask = batch["loss_mask"]
                self.tokens.append(float(mask.sum(dtype=torch.float64)))
                self.masked |= self.tokens[-1] != mask.numel()
            yield batch


def _stack(losses: list[Tensor]) -> Tensor:
    return torch.stack([loss.float() for loss in losses]) if losses else torch.empty(0)


def _through_pipeline(model: LanguageModel, batches: _Counted, groups: ParallelGroups) -> Tensor:
    """The loss of each of ``batches``, on every stage."""
    assert model.pipeline is not None

    def forward(chunk: int, batch: Mapping[str, Tensor]) -> Tensor:
        return model(**model.inputs(batch, groups.device, chunk), chunk=chunk)

    losses = _stack(forward_only(model.pipeline, forward, batches))
    here = losses if groups.is_last_stage else torch.full((len(batches.tokens),), math.nan, device=groups.device)
    return from_last_stage(here, groups)


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows; NaN stays NaN."""
    return math.inf if loss >= 700 else math.exp(loss)


def bits_per_byte(loss: float, tokens: int, text_bytes: int | None) -> float | None:
    """``loss`` of ``tokens`` tokens in bits, per byte of their text: comparable between tokenizers.

    None where the bytes are not known, or there are none.
    """
    return loss * tokens / (math.log(2) * text_bytes) if text_bytes else None
