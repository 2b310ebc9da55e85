"""What must be the same on several ranks: the structure that they execute, and their copies of a weight, bit for bit.

Under ZeRO 0 to 2 every data-parallel rank holds all weights of its tensor-parallel share; parameters that are
not sharded are the same on all tensor-parallel ranks too. Under ZeRO-3 a rank holds a part of each parameter,
of which the tensor-parallel ranks hold copies where it is not sharded. A flipped bit, or a missing sum of
gradients, makes copies drift without any error.

They are compared every so many steps, before every save, and after a checkpoint has been loaded.

Cost: one pass over the weights and a gather of two numbers per rank; the rest only after a difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.checkpoint import layout
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError, SGTError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.model.apply_plan import executed_plan
from megatron_sgt.parallel.collectives import on_rank_zero
from megatron_sgt.parallel.groups import ParallelGroups

if TYPE_CHECKING:
    import deepspeed

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
"""Elements that are widened to 64 bits at a time: 32 MB, whatever the size of a parameter."""


class PlanMismatchError(SGTError):
    """Ranks execute different LoopPlans: a bug, or a machine that computes wrongly."""


class CorruptionError(SGTError):
    """Copies of a weight differ: a machine that computes wrongly, or a bug."""


class ReplicaCheckHook(Hook):
    """Compares every ``interval`` steps, and before every save (every ``save_interval`` steps and at the end).

    Comes before the hook that saves: what differs must not become a checkpoint.
    """

    name = "replicas"

    def __init__(
        self,
        model: torch.nn.Module,
        intervals: Sequence[int],
        zero_stage: int,
        groups: ParallelGroups,
        root: Path | None = None,
    ) -> None:
        """``root``: where the run saves, to name a checkpoint to go back to."""
        self.model = model
        self.root = root
        self.equal_at: int | None = None
        self.intervals = [interval for interval in intervals if interval]
        self.zero_stage = zero_stage
        self.groups = groups

    def before_run(self, state: TrainState) -> None:
        """What was loaded has been compared."""
        self.equal_at = state.step or None

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if result.applied and any(state.step % interval == 0 for interval in self.intervals):
            self._compare(state.step)

    def after_run(self, state: TrainState) -> None:
        """Compare the end of the run."""
        self._compare(state.step)

    def after_stage(self, state: TrainState) -> None:
        """What follows is made of these weights."""
        if self.equal_at != state.step:
            self._compare(state.step)

    def _compare(self, step: int) -> None:
        try:
            verify_replicas(self.model, step, self.zero_stage, self.groups)
        except CorruptionError as error:
            advice = on_rank_zero(lambda: _advice(self.equal_at, self.root))
            raise CorruptionError(
                f"{error}. Nothing was saved. {advice}; if it happens again, exclude the machine of that rank"
            ) from None
        self.equal_at = step

    def on_stop(self, state: TrainState, reason: int) -> None:
        self.after_run(state)


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
    if groups.pp_size > 1:  # a stage knows its own layers
        each = groups.tp_size * groups.dp_size
        everyone = everyone[groups.pp_rank * each : (groups.pp_rank + 1) * each]
    if all(torch.equal(everyone[0], other) for other in everyone):
        return
    plans: list[LoopPlan | None] = [None] * groups.world_size
    dist.all_gather_object(plans, plan)
    rank = next(r for r, other in enumerate(plans) if other != plans[0])
    raise PlanMismatchError(
        f"rank {rank} executes another structure than rank 0: {plans[rank]} instead of {plans[0]}. "
        "Resume from the last checkpoint; if it happens again, exclude that rank's machine"
    )


def checksum(values: Tensor) -> Tensor:
    """Sum over elements of (bit pattern as an integer) · (2 · index + 1), modulo 2^64: an int64 scalar.

    The factors are odd, so a change of any single element, by any number of bits, changes the sum.
    """
    flat = values.detach().reshape(-1).view(_INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), _CHUNK):
        chunk = flat[start : start + _CHUNK].to(torch.int64)
        index = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=flat.device)
        total += (chunk * (2 * index + 1)).sum()
    return total


def _advice(equal_at: int | None, root: Path | None) -> str:
    """Where to start again: at a checkpoint of a step after which the copies were seen equal, or of one before it."""
    if equal_at is None:
        return "They have not been compared before in this run: start again from scratch, or from an older run"
    when = f"The copies were last equal after step {equal_at:,}"
    tags = [] if root is None else [t for t in layout.finished_tags(root) if layout.step_of(t) <= equal_at]
    if root is None or not tags:
        return f"{when}, and no checkpoint was written by then: start again from scratch"
    there = root / tags[-1]
    begun = f"{when}, so the last checkpoint from before the damage is {there}"
    first = layout.candidates(root)[0][0]
    if first == tags[-1]:
        return f"{begun}: start again, the run continues from it"
    return f"{begun}: write {tags[-1]} into {root / layout.LATEST_FILE} and start again"


def verify_replicas(model: torch.nn.Module, step: int, zero_stage: int, groups: ParallelGroups) -> None:
    """Compare all copies; collective.

    Raises:
        CorruptionError: on every rank, naming the ranks whose copies differ from the majority's, and the weights.
    """
    wrong = differing_copies(model, zero_stage, groups)
    if wrong:
        ranks, names = _named(wrong)
        raise CorruptionError(
            f"after step {step}, weights that must be equal differ: rank {ranks} from the others, in {names}"
        )


def verify_loaded(
    engine: deepspeed.DeepSpeedEngine, folder: Path, saved: Mapping[str, Any], groups: ParallelGroups
) -> None:
    """Compare all copies after the checkpoint ``folder``, whose state is ``saved``, was loaded; collective.

    Raises:
        CheckpointError: on every rank, naming the ranks that differ, the weights, and the files that they have read.
    """
    if groups.world_size == 1:
        return
    wrong = differing_copies(engine.module, engine.zero_optimization_stage(), groups)
    if not wrong:
        return
    where: Mapping[str, Any] | None = saved["layout"]
    read: dict[str, None] = {}
    if where is not None and where["tensor_model_parallel_size"] == groups.tp_size:
        for rank in sorted({rank for found in wrong.values() for rank in found}):
            dp_rank, tp_rank = divmod(rank, groups.tp_size)
            if dp_rank < where["data_parallel_size"]:
                read |= dict.fromkeys(layout.files_of_rank(where, tp_rank, dp_rank))
    ranks, names = _named(wrong)
    raise CheckpointError(
        f"checkpoint {folder}: after loading, weights that must be equal differ: rank {ranks} from the others, in "
        f"{names}, read from {_first(list(read), 4) or 'all its files'}. Copy it again; to go back to an older one "
        f"write its name into {folder.parent / layout.LATEST_FILE}; if another differs too, exclude the machine of "
        "that rank"
    )


def _named(wrong: Mapping[str, Sequence[int]]) -> tuple[str, str]:
    """The ranks and the weights of ``differing_copies``, for people."""
    ranks = sorted({rank for found in wrong.values() for rank in found})
    return ", ".join(map(str, ranks)), _first(list(wrong), 3)


def _first(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def differing_copies(model: torch.nn.Module, zero_stage: int, groups: ParallelGroups) -> dict[str, list[int]]:
    """Name -> ranks whose copies differ from the majority's, of the weights that must be equal; collective."""
    if groups.world_size == 1:
        return {}
    names, sharded, sums = _checksums(model, groups.device)
    shared = sums[~sharded]
    totals = torch.stack([_fold(shared), _fold(sums[sharded])])
    gathered = [torch.empty_like(totals) for _ in range(groups.world_size)]
    dist.all_gather(gathered, totals)
    everyone = [tuple(row.tolist()) for row in gathered]
    if not _differing(everyone, zero_stage, groups):
        return {}
    tables = [torch.empty_like(sums) for _ in range(groups.world_size)]
    dist.all_gather(tables, sums)
    wrong: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        column = [int(table[index]) for table in tables]
        pairs = [(0, value) if sharded[index] else (value, 0) for value in column]
        ranks = _differing(pairs, zero_stage, groups)
        if ranks:
            wrong[name] = ranks
    return wrong


def _checksums(model: torch.nn.Module, device: torch.device) -> tuple[list[str], Tensor, Tensor]:
    """Names, whether each is sharded over tensor-parallel ranks, and checksums of the parameters, on ``device``.

    With ``offload_param`` the parts of large parameters lie in host memory, those of small ones do not; each is
    summed where it is.
    """
    named = list(model.named_parameters())
    sums = torch.stack([checksum(getattr(p, "ds_tensor", p)).to(device) for _, p in named])
    sharded = torch.tensor([bool(getattr(p, "tensor_model_parallel", False)) for _, p in named], device=device)
    return [name for name, _ in named], sharded, sums


def _fold(sums: Tensor) -> Tensor:
    """One number made of several, each with an odd factor of its own."""
    index = torch.arange(sums.numel(), dtype=torch.int64, device=sums.device)
    return (sums * (2 * index + 1)).sum()


def _differing(values: Sequence[tuple[int, ...]], zero_stage: int, groups: ParallelGroups) -> list[int]:
    """Ranks whose (replicated, sharded) numbers differ from the majority of those that must hold the same.

    Of two differing copies either may be the right one: both are named.
    """
    wrong: set[int] = set()
    for kind in (0, 1):
        for ranks in _copies(kind == 1, zero_stage, groups):
            votes = Counter(values[rank][kind] for rank in ranks)
            (most, count), *rest = votes.most_common()
            tie = bool(rest) and rest[0][1] == count
            wrong |= {rank for rank in ranks if rest and (tie or values[rank][kind] != most)}
    return sorted(wrong)


def _copies(sharded: bool, zero_stage: int, groups: ParallelGroups) -> list[list[int]]:
    """Sets of ranks that hold the same values; tensor-parallel ranks are neighbours (Megatron's order)."""
    tensor, replicas = groups.tp_size, groups.dp_size
    if zero_stage == 3:
        return [] if sharded else [[d * tensor + t for t in range(tensor)] for d in range(replicas)]
    if sharded:
        return [[d * tensor + t for d in range(replicas)] for t in range(tensor)]
    return [list(range(groups.world_size))]
