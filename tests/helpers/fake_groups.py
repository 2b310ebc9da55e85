"""A place in a run that does not exist: for code that reads ranks and sizes and talks to nobody."""

from typing import Any

import torch

from megatron_sgt.parallel.groups import ParallelGroups


def fake_groups(
    tp_rank: int = 0, tp_size: int = 1, dp_rank: int = 0, dp_size: int = 1, pp_rank: int = 0, pp_size: int = 1
) -> ParallelGroups:
    """Megatron's order: ranks of a tensor-parallel group are neighbours, stages come last. Process groups are None."""
    nobody: Any = None
    return ParallelGroups(
        rank=(pp_rank * dp_size + dp_rank) * tp_size + tp_rank,
        world_size=tp_size * dp_size * pp_size,
        tp_rank=tp_rank,
        tp_size=tp_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        pp_rank=pp_rank,
        pp_size=pp_size,
        tp_group=nobody,
        dp_group=nobody,
        pp_group=nobody,
        mp_group=nobody,
        device=torch.device("cpu"),
    )
