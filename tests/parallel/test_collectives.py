"""What the collectives do with what the group returns; the group itself is pretended here."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sgt.parallel.collectives import any_rank, barrier, broadcast_object, mean_over_data_parallel
from tests.helpers.fake_groups import fake_groups


@pytest.fixture
def no_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a single process talks to nobody")

    for name in ("all_reduce", "broadcast_object_list", "barrier"):
        monkeypatch.setattr(dist, name, refuse)


@pytest.mark.usefixtures("no_communication")
def test_alone() -> None:
    alone = fake_groups()
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert torch.equal(mean_over_data_parallel(values.clone(), alone), values)
    assert any_rank(True, alone) is True
    assert any_rank(False, alone) is False
    assert broadcast_object({"step": 3}, alone) == {"step": 3}
    barrier(alone)


@pytest.mark.usefixtures("no_communication")
def test_tensor_parallel_replicas_need_no_mean() -> None:
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(mean_over_data_parallel(values.clone(), fake_groups(1, 4)), values)


def test_mean_over_data_parallel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other three ranks hold 1, 2 and 6."""
    groups = fake_groups(0, 2, 1, 4)
    asked = []

    def all_reduce(values: torch.Tensor, group: object = "world") -> None:
        asked.append(group)
        values += 9.0

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert mean_over_data_parallel(torch.tensor([3.0, -1.0]), groups).tolist() == [3.0, 2.0]
    assert asked == [groups.dp_group]


@pytest.mark.parametrize(("mine", "others"), [(True, False), (False, True), (False, False)])
def test_any_rank(mine: bool, others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(value: torch.Tensor, op: Any) -> None:
        assert op == dist.ReduceOp.MAX
        value.clamp_(min=int(others))

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    assert any_rank(mine, fake_groups(0, 1, 0, 2)) is (mine or others)


@pytest.mark.parametrize("rank", [0, 1])
def test_broadcast_object(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def broadcast(holder: list[Any], src: int, device: torch.device) -> None:
        assert src == 0 and device == torch.device("cpu")
        assert holder == (["of rank 0"] if rank == 0 else [None])
        holder[0] = "of rank 0"

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    assert broadcast_object(f"of rank {rank}", fake_groups(rank, 2)) == "of rank 0"
