"""What must be the same on several ranks: the structure that they execute, and their copies of a weight, bit for bit.

Under ZeRO 0 to 2 every data-parallel rank holds all weights of its tensor-parallel share of a pipeline stage;
parameters that are not sharded are the same on all tensor-parallel ranks of the stage too. Under ZeRO-3 a rank holds a
part of each parameter, of which the tensor-parallel ranks hold copies where it is not sharded. A flipped bit, or a
missing sum of gradients, makes copies drift without any error.

They are compared every so many steps, before every save, and after a checkpoint has been loaded.

Cost: one pass over the weights and a gather of two numbers per rank; the rest only after a difference.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgt.checkpoint import layout
from megatron_sgt.config.pipeline import PipelineLayout
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
    """Compares every ``interval`` steps, and before every save (every ``save_interval`` steps, at the end, when asked).

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
        self._save_now = False

    def before_run(self, state: TrainState) -> None:
        """What was loaded has been compared."""
        self.equal_at = state.step or None

    def after_step(self, state: TrainState, result: StepResult) -> None:
        due = self._save_now or any(state.step % interval == 0 for interval in self.intervals)
        if result.applied and due:
            self._save_now = False
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

    def on_save_now(self, state: TrainState) -> None:
        self._save_now = True


def verify_same_plan(model: torch.nn.Module, decided: LoopPlan, groups: ParallelGroups) -> None:
    """Compare a hash of the plan that this rank executes with all other ranks'; collective.

    A pipeline stage executes its own layers only: for the others stands what its schedule has ``decided``, so that
    ranks of all stages can be compared.

    Raises:
        PlanMismatchError: on every rank, naming the first rank that differs from the majority and both plans.
    """
    if groups.world_size == 1:
        return
    plan = executed_plan(model, decided)
    digest = bytes.fromhex(plan.fingerprint())
    mine = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(groups.device)
    everyone = [torch.empty_like(mine) for _ in range(groups.world_size)]
    dist.all_gather(everyone, mine)
    if all(torch.equal(everyone[0], other) for other in everyone):
        return
    plans: list[LoopPlan | None] = [None] * groups.world_size
    dist.all_gather_object(plans, plan)
    common = Counter(plans).most_common(1)[0][0]  # of two plans that are as common the lower rank's
    usual = plans.index(common)
    rank = next(r for r, other in enumerate(plans) if other != common)
    raise PlanMismatchError(
        f"rank {rank} executes another structure than rank {usual}: {plans[rank]} instead of {common}. "
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
    if where is not None and _is_cut_alike(where, engine.module.layout, groups):
        for rank in sorted({rank for found in wrong.values() for rank in found}):
            rest, tp_rank = divmod(rank, groups.tp_size)
            pp_rank, dp_rank = divmod(rest, groups.dp_size)
            if dp_rank < where["data_parallel_size"]:
                read |= dict.fromkeys(layout.files_of_rank(where, tp_rank + groups.tp_size * pp_rank, dp_rank))
    ranks, names = _named(wrong)
    raise CheckpointError(
        f"checkpoint {folder}: after loading, weights that must be equal differ: rank {ranks} from the others, in "
        f"{names}, read from {_first(list(read), 4) or 'all its files'}. Copy it again; to go back to an older one "
        f"write its name into {folder.parent / layout.LATEST_FILE}; if another differs too, exclude the machine of "
        "that rank"
    )


def _is_cut_alike(where: Mapping[str, Any], stages: PipelineLayout, groups: ParallelGroups) -> bool:
    """Whether each rank has read the files of its own place: no other sizes, no other layers on the stages."""
    sizes = where["tensor_model_parallel_size"], where.get(layout.PIPELINE_SIZE, 1)
    counts = where.get(layout.PIPELINE_COUNTS)  # only a pipeline has them
    return sizes == (groups.tp_size, groups.pp_size) and (counts is None or tuple(counts) == stages.counts)


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
    mine = {
        name: (0, value) if split else (value, 0)
        for name, split, value in zip(names, sharded.tolist(), sums.tolist(), strict=True)
    }
    tables: list[dict[str, tuple[int, int]]] = [{}] * groups.world_size
    dist.all_gather_object(tables, mine)  # the weights of another pipeline stage have other names
    wrong: dict[str, list[int]] = {}
    for name in dict.fromkeys(name for table in tables for name in table):
        ranks = _differing([table.get(name, (0, 0)) for table in tables], zero_stage, groups)
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
    """Sets of ranks that hold the same values, within each pipeline stage."""
    tensor, replicas, found = range(groups.tp_size), range(groups.dp_size), []
    for stage in range(groups.pp_size):
        place = partial(groups.rank_at, stage)
        if zero_stage == 3:
            found += [] if sharded else [[place(d, t) for t in tensor] for d in replicas]
        elif sharded:
            found += [[place(d, t) for d in replicas] for t in tensor]
        else:
            found.append([place(d, t) for d in replicas for t in tensor])
    return found
