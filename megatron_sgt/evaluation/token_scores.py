"""How likely given next tokens are, and which is the likeliest: over all layouts, without gathering the logits."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.model.apply_plan import begin_step
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.model.pipeline_forward import forward_only, from_last_stage, inputs_of
from megatron_sgt.parallel.groups import ParallelGroups


@torch.no_grad()
def token_scores(
    engine: Any, tokens: Tensor, targets: Tensor, vocab_size: int, groups: ParallelGroups
) -> tuple[Tensor, Tensor]:
    """One forward pass on the ranks of a model.

    Args:
        engine: of a LanguageModel in evaluation mode: through it ZeRO-3 fetches the weights.
        tokens, targets: [B, S] int64, the same on all ranks of the model.
        vocab_size: ids that a text can have; further rows pad the vocabulary.

    Returns:
        On every rank of the model, fp32 and int64 [B, S]: ln of the probability of ``targets`` after each of
        ``tokens``; the likeliest next ids, of equal ones the lowest.
    """
    model: LanguageModel = engine.module
    begin_step(model)
    batch = {"tokens": tokens, "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens)}
    if model.pipeline is None:
        return _scores(engine(**inputs_of(model.chunks[0], batch, groups.device)), targets, vocab_size, groups)
    found = forward_only(
        model.pipeline,
        lambda chunk, given: model(**inputs_of(model.chunks[chunk], given, groups.device), chunk=chunk),
        [batch],
    )
    scores = torch.empty(tokens.shape, device=groups.device), torch.empty_like(tokens, device=groups.device)
    if found:
        scores = _scores(found[0], targets, vocab_size, groups)
    return from_last_stage(scores[0], groups), from_last_stage(scores[1], groups)


def _scores(logits: Tensor, targets: Tensor, vocab_size: int, groups: ParallelGroups) -> tuple[Tensor, Tensor]:
    """``logits`` [B, S, rows]: this rank's rows of the vocabulary. Rows of fp32 are made one sequence at a time."""
    rows = logits.shape[-1]
    first = groups.tp_rank * rows
    known = max(0, min(rows, vocab_size - first))
    per_sequence = [_of_rows(one, wanted, known, first) for one, wanted in zip(logits, targets, strict=True)]
    summed, wanted, top, best = (torch.stack(values) for values in zip(*per_sequence, strict=True))
    if groups.tp_size == 1:
        return wanted - summed, best
    # Each rank's sum lies below the largest by a factor, which is exact where it is 1.
    largest, highest = summed.clone(), top.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=groups.tp_group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=groups.tp_group)
    parts = torch.exp(summed - largest)
    dist.all_reduce(parts, group=groups.tp_group)
    dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=groups.tp_group)
    best = torch.where(top == highest, best, torch.iinfo(best.dtype).max)
    dist.all_reduce(best, op=dist.ReduceOp.MIN, group=groups.tp_group)
    return wanted - largest - parts.log(), best


def _of_rows(logits: Tensor, targets: Tensor, known: int, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of [S, rows], over its ``known`` rows from id ``first`` on.

    Returns:
        [S] each: ln of the summed exponentials, the target's logit (-inf where another rank has it), the highest logit
        and its id.
    """
    if not known:
        nothing = torch.full(targets.shape, -math.inf, device=logits.device)
        return nothing, nothing, nothing, torch.zeros_like(targets, device=logits.device)
    logits = logits[:, :known].float()
    inside = targets.to(logits.device) - first
    here = (inside >= 0) & (inside < known)
    wanted = logits.gather(1, inside.clamp(0, known - 1)[:, None])[:, 0].masked_fill(~here, -math.inf)
    top, best = logits.max(dim=1)
    return logits.logsumexp(dim=1), wanted, top, best + first
