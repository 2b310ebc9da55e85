"""Weights of micro-batches whose losses are masked unevenly: a step's loss is then the mean over all its tokens.

A step is the mean of its micro-batches over accumulation and data-parallel ranks. Times

    w = n · (micro-batches of the step) / (tokens of the step),    n: tokens of the micro-batch whose mask is 1

the mean of a micro-batch is its part of the sum over the step's tokens, so that neither the size of micro-batches nor
the number of ranks matters. Where all masks are equal, w is 1, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.data.loader import MicroBatch
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.parallel.packed_copy import on_device


def weighted(
    batches: Iterable[MicroBatch], uneven: bool, groups: ParallelGroups
) -> Iterator[tuple[MicroBatch, dict[str, Tensor]]]:
    """The micro-batches of a step, each with its weight as an argument of the model; read one by one if not ``uneven``.

    Collective over the data-parallel ranks, which have as many micro-batches. A step that counts no token has loss 0.
    """
    if not uneven:
        for batch in batches:
            yield batch, {}
        return
    held = list(batches)
    tokens = torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in held])
    own = on_device(tokens, groups.device)
    total = own.sum()
    if groups.dp_size > 1:
        dist.all_reduce(total, group=groups.dp_group)
    weights = own * (len(held) * groups.dp_size) / total.clamp(min=1.0)
    for batch, weight in zip(held, weights.unbind(), strict=True):
        yield batch, {"weight": weight}
