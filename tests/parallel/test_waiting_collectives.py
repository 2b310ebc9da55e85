"""One rank works for longer than a collective may last, or fails; the others wait for it, or are told."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sgt.errors import CheckpointError, DataError
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.parallel import collectives
from megatron_sgt.parallel.collectives import (
    OtherRankFailedError,
    barrier,
    gather_or_raise,
    on_rank_zero,
    wait_for_all,
)
from megatron_sgt.parallel.groups import current_groups, initialize_groups
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import small_config

TIMEOUT, LONGER = 2.0, 3.0
"""Seconds: of a collective, and of the work."""


def unpicklable() -> Exception:
    error = DataError("no room")
    error.lock = open(__file__)  # type: ignore[attr-defined]  # noqa: SIM115
    return error


FAILURES: dict[str, Callable[[], Exception]] = {
    "mistake": lambda: CheckpointError("no room"),
    "bug": lambda: ZeroDivisionError("seven by none"),
    "unpicklable": unpicklable,
}


def told(action: Callable[[], Any]) -> tuple[str, str]:
    """Type and message of what ``action`` raises."""
    try:
        return "", repr(action())
    except Exception as error:
        return type(error).__name__, str(error)


def meet(info: RankInfo) -> dict[str, Any]:
    """Every way to wait, with a rank that is late or fails."""
    initialize_groups(small_config().parallel, info, torch.device("cpu"))
    groups = current_groups(torch.device("cpu"))
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=TIMEOUT))

    def late(rank: int) -> int:
        if info.rank == rank:
            time.sleep(LONGER)
        return 10 + info.rank

    def fails(rank: int, kind: str) -> int:
        if info.rank == rank:
            raise FAILURES[kind]()
        return 0

    def late_at(rank: int, wait: Callable[[], None]) -> float:
        begun = time.monotonic()
        late(rank)
        wait()
        return time.monotonic() - begun

    seen: dict[str, Any] = {
        "rank 0 works": on_rank_zero(lambda: late(0)),
        "rank 1 works longest": gather_or_raise(lambda: late(1), groups),
        "rank 1 comes late": late_at(1, lambda: barrier(groups)),
    }
    for kind in FAILURES:
        seen[f"rank 0, {kind}"] = told(lambda kind=kind: on_rank_zero(lambda: fails(0, kind)))
        seen[f"rank 1, {kind}"] = told(lambda kind=kind: gather_or_raise(lambda: fails(1, kind), groups))
    seen["and all go on"] = gather_or_raise(lambda: late(2), groups)
    return seen


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return run_on_ranks(2, meet, backend="gloo")


def test_work_may_take_longer_than_a_collective(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["rank 0 works"] == 10
        assert seen["rank 1 works longest"] == [10, 11]
        assert seen["rank 1 comes late"] >= LONGER
        assert seen["and all go on"] == [10, 11]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_is_told_on_all(failing: int, ranks: list[dict[str, Any]]) -> None:
    own, other = ranks[failing], ranks[1 - failing]
    name = f"rank {failing}, "
    assert own[name + "mistake"] == other[name + "mistake"] == ("CheckpointError", "no room")
    assert own[name + "bug"] == ("ZeroDivisionError", "seven by none")
    words = f"rank {failing} failed: ZeroDivisionError: seven by none"
    assert other[name + "bug"] == ("OtherRankFailedError", words)
    assert own[name + "unpicklable"] == ("DataError", "no room")
    assert other[name + "unpicklable"] == (
        "OtherRankFailedError",
        f"rank {failing} failed: DataError: no room",
    )


def collective_alone(info: RankInfo) -> str:
    """What the others meet if rank 0 keeps them waiting in a collective."""
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=TIMEOUT))
    if info.rank == 0:
        time.sleep(LONGER)
        return ""
    return told(lambda: dist.broadcast_object_list([None], src=0))[1]


def test_a_collective_would_have_given_up() -> None:
    assert "Timed out" in run_on_ranks(2, collective_alone, backend="gloo")[1]


def test_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives.dist, "is_initialized", lambda: False)
    assert on_rank_zero(lambda: 7) == 7 and gather_or_raise(lambda: 7, fake_groups()) == [7]
    wait_for_all()

    def fails() -> None:
        raise CheckpointError("full")

    for wait in (lambda: on_rank_zero(fails), lambda: gather_or_raise(fails, fake_groups())):
        with pytest.raises(CheckpointError, match=r"^full$"):
            wait()


def test_the_store_is_asked_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of waiting: each rank asks about twice per second, and is seen within half of one."""
    now, pauses = [0.0], list[float]()

    class Store:
        def check(self, keys: list[str]) -> bool:
            return now[0] > 3600.0

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    for name, value in {"get_rank": lambda: 1, "get_world_size": lambda: 2}.items():
        monkeypatch.setattr(collectives.dist, name, value)
    monkeypatch.setattr(collectives.dist.distributed_c10d, "_get_default_store", Store)
    monkeypatch.setattr(collectives.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(collectives.time, "sleep", sleep)
    collectives._wait_at_store(for_all=False)
    assert pauses[0] < 0.01 and max(pauses) == collectives.MAX_PAUSE_SECONDS and len(pauses) < 7400


def test_the_other_rank_is_a_consequence() -> None:
    from megatron_sgt.guard.report import is_consequence

    assert is_consequence(OtherRankFailedError("rank 3 failed: ZeroDivisionError"))
