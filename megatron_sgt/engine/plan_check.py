"""Stops a run whose ranks execute different structures, before a checkpoint or many steps are lost to it."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_sgt.errors import SGTError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.model.apply_plan import executed_plan
from megatron_sgt.parallel.groups import ParallelGroups


class PlanMismatchError(SGTError):
    """Ranks execute different LoopPlans: a bug, or a machine that computes wrongly."""


def verify_same_plan(model: torch.nn.Module, groups: ParallelGroups) -> None:
    """Compare a hash of the plan that this rank's layers execute with all other ranks'; collective.

    Raises:
        PlanMismatchError: on every rank, naming the first rank that differs from rank 0 and both plans.
    """
    if groups.world_size == 1:
        return
    plan = executed_plan(model)
    digest = bytes.fromhex(plan.fingerprint())
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(groups.device)
    everyone = [torch.empty_like(mine) for _ in range(groups.world_size)]
    dist.all_gather(everyone, mine)
    if all(torch.equal(everyone[0], other) for other in everyone):
        return
    plans: list[LoopPlan | None] = [None] * groups.world_size
    dist.all_gather_object(plans, plan)
    rank = next(r for r, other in enumerate(plans) if other != plans[0])
    raise PlanMismatchError(
        f"rank {rank} executes another structure than rank 0: {plans[rank]} instead of {plans[0]}. "
        "Resume from the last checkpoint; if it happens again, exclude that rank's machine"
    )
