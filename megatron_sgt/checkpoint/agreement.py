"""What one rank could not do, all ranks know: none goes on alone, and none waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megatron_sgt.errors import CheckpointError
from megatron_sgt.parallel.groups import ParallelGroups

T = TypeVar("T")


def agreed(action: Callable[[], T], groups: ParallelGroups) -> list[T]:
    """The results of ``action`` by rank; collective. A CheckpointError of one rank is raised on all."""
    result, problem = None, None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    outcomes: list = [(result, problem)] * groups.world_size
    if groups.world_size > 1:
        dist.all_gather_object(outcomes, (result, problem))
    told = [text for _, text in outcomes if text is not None]
    if told:
        raise CheckpointError(told[0])
    return [value for value, _ in outcomes]
