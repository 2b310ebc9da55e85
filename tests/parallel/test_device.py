"""The choice of device, on machines that are only pretended."""

import types

import pytest
import torch

from megatron_sgt.errors import ConfigError
from megatron_sgt.parallel.device import (
    backend_for,
    device_name,
    memory_gb,
    resolve_precision,
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
            "device_count": lambda: gpus,
            "set_device": lambda device: self.calls.append(("set_device", device)),
            "synchronize": lambda device: self.calls.append(("synchronize", device)),
            "get_device_properties": lambda device: types.SimpleNamespace(total_memory=80_000_000_000),
            "max_memory_allocated": lambda device: 1_500_000_000,
            "get_device_name": lambda device: "NVIDIA H200",
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize(
    ("wanted", "gpus", "local_rank", "device"),
    [
        ("auto", 0, 0, "cpu"),
        ("auto", 0, 7, "cpu"),
        ("cpu", 0, 3, "cpu"),
        ("cpu", 4, 3, "cpu"),
        ("auto", 4, 3, "cuda:3"),
        ("cuda", 1, 0, "cuda:0"),
    ],
)
def test_select_device(
    wanted: str, gpus: int, local_rank: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, gpus)
    assert select_device(wanted, local_rank) == torch.device(device)
    assert machine.calls == ([("set_device", local_rank)] if device.startswith("cuda") else [])


@pytest.mark.parametrize(
    ("wanted", "gpus", "message"),
    [
        ("cuda", 0, "parallel.device is cuda but torch sees no GPU; use parallel.device=cpu or auto"),
        ("cuda", 2, "local rank 2 has no GPU: this host has 2"),
        ("auto", 1, "local rank 2 has no GPU: this host has 1"),
    ],
)
def test_missing_gpus(wanted: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, gpus)
    with pytest.raises(ConfigError, match=message):
        select_device(wanted, local_rank=2)


def test_backend() -> None:
    assert (backend_for(CPU), backend_for(GPU)) == ("gloo", "nccl")


@pytest.mark.parametrize(
    ("wanted", "device", "precision"),
    [("auto", CPU, "fp32"), ("auto", GPU, "bf16"), ("fp16", GPU, "fp16"), ("bf16", CPU, "bf16")],
)
def test_precision(wanted: str, device: torch.device, precision: str) -> None:
    assert resolve_precision(wanted, device) == precision


def test_facts_about_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 2)
    assert memory_gb(CPU) == (None, None)
    assert memory_gb(GPU) == (1.5, 80.0)
    assert (device_name(CPU), device_name(GPU)) == ("cpu", "NVIDIA H200")
    synchronize(CPU)
    assert machine.calls == []
    synchronize(GPU)
    assert machine.calls == [("synchronize", GPU)]
