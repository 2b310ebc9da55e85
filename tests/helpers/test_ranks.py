"""The helper that the tests of parallel layouts stand on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron_sgt.errors import DataError
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.ranks import RankError, run_on_ranks


def add_up(info: RankInfo, value: float) -> tuple[int, float, int]:
    total = torch.tensor(value * (info.rank + 1))
    dist.all_reduce(total)
    return info.rank, float(total), os.getpid()


def fail_on(info: RankInfo, rank: int) -> None:
    if info.rank == rank:
        raise DataError(f"rank {rank} has had enough")
    dist.barrier()


def die_on(info: RankInfo, rank: int) -> None:
    if info.rank == rank:
        os._exit(7)
    dist.barrier()


def hang_on(info: RankInfo, rank: int) -> None:
    print("before the long sleep", flush=True)
    if info.rank == rank:
        time.sleep(600)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_back_by_rank(world_size: int) -> None:
    results = run_on_ranks(world_size, add_up, 0.5)
    assert [rank for rank, _, _ in results] == list(range(world_size))
    assert {total for _, total, _ in results} == {0.5 * world_size * (world_size + 1) / 2}
    assert len({pid for *_, pid in results}) == world_size


def test_the_failing_rank_speaks() -> None:
    with pytest.raises(DataError, match="rank 1 has had enough") as caught:
        run_on_ranks(2, fail_on, 1)
    assert "in fail_on" in str(caught.value.__cause__)


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises((RankError, RuntimeError)) as caught:
        run_on_ranks(2, die_on, 0)
    assert "rank 0: died with exit code 7" in str(caught.value.__cause__)


def test_a_rank_that_hangs_shows_its_stack() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"rank \[0\] of 2 not finished after 2 s") as caught:
        run_on_ranks(2, hang_on, 0, timeout=2)
    assert time.monotonic() - start < 8
    assert "in hang_on" in str(caught.value.__cause__)
    assert "before the long sleep" in str(caught.value.__cause__)
