"""Who sits where: the rules, and what ranks make of them together."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import types
from typing import Any

import pytest
import torch

from megatron_sgt.engine.build import start_processes
from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.parallel import groups as groups_module
from megatron_sgt.parallel import placement
from megatron_sgt.parallel.placement import Seat, advice, own_seat, shared_device, spanning_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import small_config

GIB = 2**30


def seats(*hosts: str, **about: Any) -> list[Seat]:
    """A GPU of its own for every rank."""
    return [Seat(host, f"GPU-{rank}", **about) for rank, host in enumerate(hosts)]


def test_two_ranks_on_one_gpu_are_named() -> None:
    assert shared_device(seats("a", "a", "b")) is None
    assert shared_device([Seat("a"), Seat("a")]) is None, "ranks on CPUs"
    told = shared_device([Seat("a", "GPU-0"), Seat("b", "GPU-1"), Seat("b", "GPU-2"), Seat("b", "GPU-1")])
    assert told is not None and told.startswith("rank 1 and rank 3 on b have the same GPU (GPU-1)")


@pytest.mark.parametrize(
    ("hosts", "tensor_parallel", "spanning"),
    [
        ("a a a a b b b b", 4, []),
        ("a a a a b b b b", 8, [(0, ["a", "b"])]),
        ("a b a b", 2, [(0, ["a", "b"]), (2, ["a", "b"])]),  # --distribution=cyclic
        ("a b a b", 1, []),
        ("a a a b b b", 2, [(2, ["a", "b"])]),  # three ranks per host
    ],
)
def test_tensor_parallel_groups_that_span_hosts(
    hosts: str, tensor_parallel: int, spanning: list[tuple[int, list[str]]]
) -> None:
    assert spanning_groups(hosts.split(), tensor_parallel) == spanning


def test_advice_names_groups_hosts_and_the_remedy() -> None:
    assert advice(seats("a", "a", "b", "b"), 2) == []
    [cyclic] = advice(seats("a", "b", "a", "b"), 2)
    assert cyclic.startswith("2 of 2 tensor-parallel groups span hosts, the one of rank 0 a, b:")
    assert "--distribution=block:block" in cyclic
    [wide] = advice(seats(*"abcdefgh"), 8)
    assert "rank 0 a, b, c and 5 more:" in wide and "tensor_model_parallel_size of at most 1," in wide
    assert "pipeline_model_parallel_size) across hosts" in wide
    # Stages may meet over the network: PP2 x DP2 x TP2 on two hosts, PP4 x TP2 on four.
    assert advice(seats(*"aaaabbbb"), 2) == [] and advice(seats(*"aabbccdd"), 2) == []


def test_advice_on_the_limits_of_hosts_with_gpus() -> None:
    [locked] = advice(seats("a", "b", lockable=64 << 10), 1)
    assert locked.startswith("memory that may be locked is limited on a, b, and InfiniBand needs it")
    assert advice(seats("a", "a", lockable=64 << 10), 1) == [], "one host has no network to cross"
    [shared] = advice(seats("a", "a", shared=64 << 20), 1)
    assert shared.startswith("/dev/shm is smaller than 1 GiB on a,")
    assert advice(seats("a", "a", shared=GIB), 1) == []
    assert advice([Seat("a", None, 64 << 10, 64 << 20), Seat("b", None, 64 << 10, 64 << 20)], 1) == []


def test_own_seat() -> None:
    seat = own_seat(torch.device("cpu"))
    assert (seat.host, seat.device) == (socket.gethostname(), None)
    assert seat.shared is None or seat.shared > 0
    assert seat.lockable is None or seat.lockable >= 0


def pretend_gpus(gpus: list[str], hosts: str) -> list[object]:
    """This rank sees one GPU, its own of ``gpus``, on its own of ``hosts``. Returns the devices of its barriers."""
    rank = int(os.environ["RANK"])
    os.environ.pop("DS_ACCELERATOR", None)  # chosen when there was no GPU yet
    for name, fake in {
        "is_available": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "set_device": lambda index: None,
        "get_device_properties": lambda device: types.SimpleNamespace(uuid=gpus[rank]),
    }.items():
        setattr(torch.cuda, name, fake)
    groups_module.backend_for = lambda device: "gloo"
    waited: list[object] = []
    placement.barrier = lambda groups: waited.append(groups.device)
    socket.gethostname = lambda: hosts[rank]
    return waited


def bound_ranks(info: RankInfo) -> dict[str, Any]:
    """Start three times on pretended GPUs: each rank has its own; the same, cyclic over hosts; one for both."""
    os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(info.local_rank)
    config = small_config(parallel={"device": "cuda", "tensor_model_parallel_size": 2})
    waited = pretend_gpus(["GPU-x", "GPU-y"], "aa")
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        groups = start_processes(config, info)
    found: dict[str, Any] = {"said": said.getvalue(), "device": str(groups.device), "waited": waited}
    found["ranks"] = [os.environ[name] for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")]
    pretend_gpus(["GPU-x", "GPU-y"], "ab")
    with contextlib.redirect_stderr(said):
        start_processes(config, info)
    found["cyclic"] = said.getvalue()
    pretend_gpus(["GPU-x", "GPU-x"], "aa")
    try:
        start_processes(config, info)
    except ConfigError as error:
        found["shared"] = str(error)
    return found


def test_ranks_that_were_given_one_gpu_each() -> None:
    for rank, found in enumerate(run_on_ranks(2, bound_ranks)):
        assert found["device"] == "cuda:0", "whatever the local rank"
        assert found["ranks"] == ["0", "0"], "what DeepSpeed takes for the index of the GPU"
        assert found["waited"] == [torch.device("cuda:0")], "the first collective names the device"
        assert found["said"] == ""
        assert bool(re.search("warning: 1 of 1 tensor-parallel groups span hosts", found["cyclic"])) is (rank == 0)
        assert found["shared"].startswith("rank 0 and rank 1 on a have the same GPU (GPU-x)"), "on both ranks"
