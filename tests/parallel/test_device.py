"""The choice of device, on machines that are only pretended."""

import sys
import types
import uuid

import pytest
import torch

from megatron_sgt.errors import ConfigError
from megatron_sgt.parallel.device import (
    backend_for,
    device_name,
    device_type,
    empty_caches,
    identity,
    memory_gb,
    select_device,
    synchronize,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class Machine:
    """A machine with ``gpus`` accelerators in the place of torch.cuda; notes what is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
        self.calls: list[tuple[str, object]] = []
        fakes = {
            "is_available": lambda: gpus > 0,
            "init": lambda: self.calls.append(("init", None)),
            "device_count": lambda: gpus,
            "set_device": lambda device: self.calls.append(("set_device", device)),
            "synchronize": lambda device: self.calls.append(("synchronize", device)),
            "get_device_properties": lambda device: types.SimpleNamespace(
                total_memory=80_000_000_000, uuid=uuid.UUID(int=device.index)
            ),
            "max_memory_allocated": lambda device: 1_500_000_000,
            "get_device_name": lambda device: "NVIDIA H200",
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize(
    ("wanted", "gpus", "local_rank", "local_ranks", "device"),
    [
        ("auto", 0, 0, 1, "cpu"),
        ("auto", 0, 7, 8, "cpu"),
        ("cpu", 0, 3, 4, "cpu"),
        ("cpu", 4, 3, 4, "cpu"),
        ("auto", 4, 3, 4, "cuda:3"),
        ("auto", 8, 3, 4, "cuda:3"),
        ("cuda", 1, 0, 1, "cuda:0"),
        ("cuda", 1, 3, 4, "cuda:0"),  # bound: each rank sees its own GPU alone
    ],
)
def test_select_device(
    wanted: str, gpus: int, local_rank: int, local_ranks: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, gpus)
    chosen = select_device(wanted, local_rank, local_ranks)
    assert chosen == torch.device(device) and device_type(wanted) == chosen.type
    used = [("init", None), ("set_device", chosen.index)] if device != "cpu" else []
    assert machine.calls == used


@pytest.mark.parametrize(
    ("wanted", "gpus", "local_rank", "message"),
    [
        ("cuda", 0, 2, "parallel.device is cuda but torch sees no GPU; use parallel.device=cpu or auto"),
        ("cuda", 2, 2, "3 ranks on this host, but local rank 2 sees 2 GPUs"),
        ("auto", 2, 0, "3 ranks on this host, but local rank 0 sees 2 GPUs"),  # every rank refuses
    ],
)
def test_missing_gpus(wanted: str, gpus: int, local_rank: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=message):
        select_device(wanted, local_rank, local_ranks=3)


def test_a_gpu_that_does_not_start_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's library sees it, CUDA does not."""

    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old\nand more")

    Machine(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "init", fail)
    with pytest.raises(ConfigError, match=r"cannot start the GPU \(The NVIDIA driver .* too old\); compare"):
        select_device("auto", 0)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="CUDA finds no device"):
        select_device("cuda", 0)


def test_backend() -> None:
    assert (backend_for(CPU), backend_for(GPU)) == ("gloo", "nccl")


def test_facts_about_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 2)
    assert memory_gb(CPU) == (None, None)
    assert memory_gb(GPU) == (1.5, 80.0)
    assert identity(CPU) is None
    assert identity(GPU) == "00000000-0000-0000-0000-000000000001"
    assert (device_name(CPU), device_name(GPU)) == ("cpu", "NVIDIA H200")
    synchronize(CPU)
    assert machine.calls == []
    synchronize(GPU)
    assert machine.calls == [("synchronize", GPU)]


def test_spare_memory_goes_back_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 2)
    for name, module in (("empty_cache", torch.cuda), ("_host_emptyCache", torch._C)):
        monkeypatch.setattr(module, name, lambda name=name: machine.calls.append((name, None)), raising=False)
    compiled = types.SimpleNamespace(reset=lambda: machine.calls.append(("reset", None)))
    monkeypatch.setitem(sys.modules, "torch._dynamo", compiled)
    empty_caches(GPU)
    assert machine.calls == [("reset", None), ("synchronize", GPU), ("empty_cache", None), ("_host_emptyCache", None)]
    machine.calls.clear()
    empty_caches(CPU)
    assert machine.calls == [("reset", None)]
    monkeypatch.delitem(sys.modules, "torch._dynamo")
    empty_caches(CPU)
    assert "torch._dynamo" not in sys.modules, "its import takes seconds"
