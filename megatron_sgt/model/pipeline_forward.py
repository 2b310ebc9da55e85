"""Forward passes through a pipeline without gradients: losses of an evaluation, logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_sgt.compat.megatron_pipeline import run_schedule
from megatron_sgt.model.pipeline_stage import Pipeline
from megatron_sgt.parallel.groups import ParallelGroups

Batch = Mapping[str, Tensor]
BLOCK = 8
"""Micro-batches per stage that pass the pipeline at once: more would be held in memory for little less of a bubble."""


def inputs_of(chunk: GPTModel, batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What ``chunk`` needs of a micro-batch, on ``device``: all, tokens, labels, or nothing."""
    names = ["tokens", "position_ids"] if chunk.pre_process else []
    names += ["labels", "loss_mask"] if chunk.post_process else []
    return {name: batch[name].to(device, non_blocking=True) for name in batch if name in names}


@torch.no_grad()
def forward_only(pipeline: Pipeline, forward: Callable[[int, Batch], Tensor], batches: Iterable[Batch]) -> list[Tensor]:
    """The last chunk's output for each micro-batch, on the last stage; elsewhere none. Collective.

    Args:
        forward: (number of the chunk on this rank, micro-batch) -> its output.
        batches: of equal shape, the same on every stage; read a block at a time.
    """
    groups, found = pipeline.groups, []

    def step(chunk: int, batch: Batch) -> Tensor:
        output = forward(chunk, batch)
        if pipeline.chunks[chunk].post_process:
            found.append(output)
        return output

    if pipeline.tied is not None:
        pipeline.tied.lend()
    left = iter(batches)
    while block := list(islice(left, BLOCK * groups.pp_size)):
        # Interleaved, a multiple of the stages must pass.
        missing = -len(block) % groups.pp_size if pipeline.layout.virtual_size > 1 else 0
        before, (size, length) = len(found), block[0]["tokens"].shape
        run_schedule(pipeline.chunks, step, [*block, *block[-1:] * missing], (size, length), groups.device)
        del found[before + len(block) :]
    return found


def from_last_stage(value: Tensor, groups: ParallelGroups) -> Tensor:
    """The last stage's ``value`` on every stage; collective. The others give a tensor of its shape and type."""
    if groups.pp_size > 1:
        dist.broadcast(value, groups.rank_at(groups.pp_size - 1, groups.dp_rank, groups.tp_rank), groups.pp_group)
    return value
