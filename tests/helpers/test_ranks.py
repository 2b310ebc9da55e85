"""The helper that the tests of parallel layouts stand on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from megatron_sgt.errors import DataError
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.ranks import SHARED_MEMORY, RankError, run_on_ranks


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


def collectives(info: RankInfo) -> list[torch.Tensor]:
    """Results of every collective, on whole numbers, so that no sum is rounded; and of one larger than a piece."""
    ranks = range(info.world_size)
    mine = torch.arange(4.0 * info.world_size) + 100 * info.rank
    found = [torch.full((700_000,), 1.0 + info.rank).view(700, -1)]
    dist.all_reduce(found[0])
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.MIN):
        found.append(mine.clone())
        dist.all_reduce(found[-1], op=op)
    pair = dist.new_group([info.world_size - 2, info.world_size - 1])
    if info.rank >= info.world_size - 2:
        found.append(mine.clone())
        dist.all_reduce(found[-1], group=pair)
    for source in ranks:
        found.append(mine.to(torch.bfloat16))
        dist.broadcast(found[-1], source)
    everyone = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(everyone, mine)
    together, part, listed = torch.empty(len(mine) * info.world_size), torch.empty(4), torch.empty(4)
    dist.all_gather_into_tensor(together, mine, async_op=True).wait()
    dist.reduce_scatter_tensor(part, mine.clone())
    dist.reduce_scatter(listed, [t.clone() for t in mine.split(4)])
    total = mine.clone()
    dist.reduce(total, 0)
    objects: list[object] = [None for _ in ranks]
    dist.all_gather_object(objects, {"rank": info.rank})
    assert objects == [{"rank": rank} for rank in ranks]
    dist.barrier()
    return [*found, *everyone, together, part, listed, *([total] if info.rank == 0 else [])]


@pytest.mark.parametrize("world_size", [2, 4])
def test_shared_memory_gives_what_gloo_gives(world_size: int) -> None:
    ways = [run_on_ranks(world_size, collectives, backend=name) for name in ("gloo", SHARED_MEMORY)]
    for one, other in zip(*ways, strict=True):
        assert len(one) == len(other) and all(map(torch.equal, one, other))


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
