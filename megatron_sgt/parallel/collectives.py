"""Collectives outside Megatron-Core and DeepSpeed: small values, and work that takes one rank longer than the others.

NCCL ends the process when a collective has waited for ``parallel.distributed_timeout_minutes``; building an index or
converting a checkpoint may take longer. So a rank that is done says so in the key-value store in which the ranks have
met, and looks there until the others are. Only then does a collective carry the results: nobody waits inside it.

The wait has no timeout of its own. A rank that fails tells the others; one that dies or hangs is found by the watch
(guard), which ends this process from another thread; a lost store raises.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from megatron_sgt.errors import SGTError, of_full_disk

if TYPE_CHECKING:
    from megatron_sgt.parallel.groups import ParallelGroups

T = TypeVar("T")

MAX_PAUSE_SECONDS = 0.5
"""Between two looks at the store: a thousand ranks ask it two thousand times per second at most."""
_meetings = itertools.count()  # the same on every rank: all come to the same meetings in the same order


class OtherRankFailedError(RuntimeError):
    """Another rank has failed, and reports it itself; it is not a user's mistake."""


def mean_over_data_parallel(values: torch.Tensor, groups: ParallelGroups) -> torch.Tensor:
    """Mean of ``values`` (any shape, replicated over tensor-parallel ranks) over the data-parallel group."""
    if groups.dp_size > 1:
        dist.all_reduce(values, group=groups.dp_group)
        values /= groups.dp_size
    return values


def largest(value: int, groups: ParallelGroups) -> int:
    """The largest ``value`` of all ranks, exact up to 2^31; a single process does not touch its device."""
    if groups.world_size == 1:
        return value
    held = torch.tensor(value, dtype=torch.int32, device=groups.device)
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return int(held)


def any_rank(flag: bool, groups: ParallelGroups) -> bool:
    """True on every rank if ``flag`` is true on at least one."""
    return bool(largest(int(flag), groups))


def broadcast_object(value: Any, groups: ParallelGroups) -> Any:
    """Rank 0's ``value`` on every rank. For rare events only: it pickles."""
    if groups.world_size == 1:
        return value
    holder = [value if groups.is_main else None]
    dist.broadcast_object_list(holder, src=0, device=groups.device)
    return holder[0]


def barrier(groups: ParallelGroups) -> None:
    """Wait until every rank has come here, however long one takes."""
    if groups.world_size > 1:
        wait_for_all()
        dist.barrier(device_ids=[groups.device.index] if groups.device.index is not None else None)


def on_rank_zero(work: Callable[[], T]) -> T:
    """The picklable result of ``work``, done by rank 0 alone (or without process groups), on every rank. Collective.

    Raises:
        SGTError: on every rank, when ``work`` raised it.
        OtherRankFailedError: on the other ranks, when ``work`` raised anything else.
    """
    if not dist.is_initialized():
        return work()
    own = _attempt(work) if dist.get_rank() == 0 else None
    _wait_at_store(for_all=False)
    told: list[Any] = [None if own is None else _portable(own, 0)]
    dist.broadcast_object_list(told, src=0)
    return _result(told[0] if own is None else own)


def gather_or_raise(action: Callable[[], T], groups: ParallelGroups) -> list[T]:
    """The results of ``action``, done by every rank, by rank. Collective. Results must be picklable.

    No rank continues alone, and none waits forever for one that has failed.

    Raises:
        SGTError: on every rank, when ``action`` raised it on one.
        OtherRankFailedError: on the other ranks, when ``action`` raised anything else.
    """
    own = _attempt(action)
    outcomes: list[Any] = [own] * groups.world_size
    if groups.world_size > 1:
        _wait_at_store(for_all=True)
        dist.all_gather_object(outcomes, _portable(own, groups.rank))
        outcomes[groups.rank] = own
    if isinstance(own[1], Exception) and not isinstance(own[1], SGTError):
        raise own[1]
    return [_result(outcome) for outcome in outcomes]


def wait_for_all() -> None:
    """Return once every rank has come here. A collective must follow, before any rank leaves the run."""
    if dist.is_initialized():
        _wait_at_store(for_all=True)


def _attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except OSError as error:
        return None, of_full_disk(error) or error
    except Exception as error:
        return None, error


def _result(outcome: tuple[Any, Exception | None]) -> Any:
    value, error = outcome
    if error is not None:
        raise error
    return value


def _portable(outcome: tuple[Any, Exception | None], rank: int) -> tuple[Any, Exception | None]:
    value, error = outcome
    if error is None:
        return outcome
    if isinstance(error, SGTError):
        try:
            pickle.loads(pickle.dumps(error))
            return value, error
        except Exception:
            pass  # told in words, like a bug
    return value, OtherRankFailedError(f"rank {rank} failed: {type(error).__name__}: {error}")


def _wait_at_store(for_all: bool) -> None:
    """Return once rank 0 (``for_all``: every rank) has come to this meeting."""
    key, ranks = f"sgt/meeting/{next(_meetings)}", dist.get_world_size() if for_all else 1
    if dist.get_world_size() == 1:
        return
    store = dist.distributed_c10d._get_default_store()
    if (for_all or dist.get_rank() == 0) and store.add(f"{key}/come", 1) == ranks:
        store.set(f"{key}/open", "")
    begun = time.monotonic()
    while not store.check([f"{key}/open"]):
        # A tenth of the time that it has taken so far: short waits are not made long, long ones ask rarely.
        time.sleep(min(MAX_PAUSE_SECONDS, 0.001 + 0.1 * (time.monotonic() - begun)))
