"""Starting, reading and taking down the groups; several ranks are the integration tests' matter."""

import dataclasses
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sgt.config.parallel import ParallelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.environment import RankInfo, discover
from megatron_sgt.launch.rank_info import LOOPBACK, free_port
from megatron_sgt.parallel.groups import (
    current_groups,
    destroy_groups,
    initialize_groups,
    loopback_store,
)
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks

CPU = torch.device("cpu")


def test_one_process() -> None:
    groups = initialize_groups(ParallelConfig(), discover({}), CPU)
    assert (groups.rank, groups.world_size, groups.is_main) == (0, 1, True)
    assert (groups.tp_rank, groups.tp_size, groups.dp_rank, groups.dp_size) == (0, 1, 0, 1)
    assert dist.get_world_size(groups.tp_group) == dist.get_world_size(groups.dp_group) == 1
    assert groups.device == CPU
    with pytest.raises(dataclasses.FrozenInstanceError):
        groups.rank = 1  # type: ignore[misc]


def test_starting_twice_is_starting_once() -> None:
    first = initialize_groups(ParallelConfig(), discover({}), CPU)
    second = initialize_groups(ParallelConfig(), discover({}), CPU)
    assert first == second == current_groups(CPU)


def test_down_and_up_again() -> None:
    initialize_groups(ParallelConfig(), discover({}), CPU)
    destroy_groups()
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    destroy_groups()  # nothing left to do is no error
    assert initialize_groups(ParallelConfig(), discover({}), CPU).world_size == 1


def refused(info: RankInfo, rank: int, port: int) -> str:
    """What rank ``rank`` says when it cannot meet the others."""
    dist.destroy_process_group()
    place = RankInfo(rank, 2, rank, 2, "127.0.0.1", port, "torchrun")
    with pytest.raises(ConfigError) as caught:
        initialize_groups(ParallelConfig(distributed_timeout_minutes=0.01), place, CPU)
    return str(caught.value)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        (told,) = run_on_ranks(1, refused, 0, port)
        assert f"cannot listen on port {port}: another program does; set MASTER_PORT" in told


@pytest.mark.parametrize("device", [CPU, torch.device("cuda", 3)], ids=str)
def test_every_group_gets_the_timeout_of_the_configuration(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: dict[str, Any] = {}
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kw: calls.update(world=(backend, kw)))
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", lambda **kw: calls.update(model_parallel=kw))
    monkeypatch.setattr("megatron_sgt.parallel.groups.current_groups", lambda device: fake_groups())
    config = ParallelConfig(tensor_model_parallel_size=4, distributed_timeout_minutes=2.5)
    initialize_groups(config, RankInfo(11, 16, 3, 8, "node-7", 29511, "slurm"), device)
    backend, options = calls["world"]
    assert backend == ("gloo" if device.type == "cpu" else "nccl")
    assert options == {
        "init_method": "tcp://node-7:29511",
        "rank": 11,
        "world_size": 16,
        "timeout": timedelta(minutes=2.5),
    }
    assert calls["model_parallel"]["tensor_model_parallel_size"] == 4
    assert calls["model_parallel"]["distributed_timeout_minutes"] == 2.5


@pytest.mark.parametrize(("dp_rank", "tp_rank", "main"), [(0, 0, True), (0, 1, False), (1, 0, False)])
def test_only_rank_0_is_main(dp_rank: int, tp_rank: int, main: bool) -> None:
    assert fake_groups(tp_rank, 2, dp_rank, 2).is_main is main


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_ranks_of_one_machine_meet_where_no_other_can_listen_in() -> None:
    info = RankInfo(0, 2, 0, 2, LOOPBACK, free_port(), "deepspeed")
    store = loopback_store(info, timedelta(seconds=20))
    door, open_ports = f":{info.master_port:04X}", []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and local.endswith(door):
                open_ports.append(local)
    assert open_ports == [f"0100007F{door}"]
    other = dist.TCPStore(LOOPBACK, info.master_port, 2, False, timedelta(seconds=20), wait_for_workers=False)
    store.set("a", "1")
    assert other.get("a") == b"1"
