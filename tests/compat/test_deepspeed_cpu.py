"""DeepSpeed uses the device of the run; nothing is compiled when it starts, no range is marked unasked."""

import importlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.utils import logger, nvtx

from megatron_sgt.compat.deepspeed_cpu import choose_accelerator, prepare_deepspeed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 2)
# Its package has another attribute of that name: torch itself.
backend = importlib.import_module("deepspeed.comm.torch")


@pytest.fixture(autouse=True)
def unprepared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a new process; put back afterwards."""
    accelerator = get_accelerator()
    for name in (
        "LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "NVTE_NVTX_ENABLED",
        "NSYS_PROFILING_SESSION_ID",
    ):
        monkeypatch.setenv(name, "7")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("DS_LOG_LEVEL", raising=False)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    monkeypatch.setattr(nvtx, "enable_nvtx", True)
    level = logger.level
    monkeypatch.setattr(logger, "level", level)
    yield
    set_accelerator(accelerator)


def test_the_communication_extension_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    class Builder:
        NAME = "deepspeed_shm_comm"

        def load(self) -> object:
            built.append(self.NAME)
            return object()

        def absolute_name(self) -> str:
            return self.NAME

    accelerator: Any = type("Accelerator", (), {"create_op_builder": lambda self, name: Builder()})()
    monkeypatch.setattr(backend, "get_accelerator", lambda: accelerator)
    backend.build_shm_op()
    assert built == ["deepspeed_shm_comm"]  # what a run would do on its own
    prepare_deepspeed(CPU)
    assert backend.build_shm_op() is None
    assert len(built) == 1


@pytest.mark.parametrize("told", [None, "cpu", "cuda", "hpu"])
@pytest.mark.parametrize("found", [CPU_Accelerator, CUDA_Accelerator])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_the_device_decides_on_the_accelerator(
    device: torch.device, found: type, told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever DeepSpeed has found when it was imported, and whatever a shell has left behind."""
    set_accelerator(found())
    if told is not None:
        monkeypatch.setenv("DS_ACCELERATOR", told)
    prepare_deepspeed(device)
    assert get_accelerator().device_name() == device.type
    assert os.environ["DS_ACCELERATOR"] == device.type, "for DeepSpeed's own processes"


def test_what_is_overruled_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_accelerator("cpu") is None
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    assert choose_accelerator("cpu") == "cuda"
    assert choose_accelerator("cpu") is None


def test_deepspeed_is_told_the_index_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare_deepspeed(CPU)
    assert "LOCAL_RANK" not in os.environ
    monkeypatch.setenv("LOCAL_RANK", "3")
    prepare_deepspeed(CPU)
    assert os.environ["LOCAL_RANK"] == "3"
    prepare_deepspeed(torch.device("cuda", 0))
    assert os.environ["LOCAL_RANK"] == "0" and "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3")
    prepare_deepspeed(torch.device("cuda", 0))
    assert os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] == "0", "DeepSpeed refuses to start where they differ"


@pytest.mark.parametrize("visible", ["0,1", "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-7", "MIG-c7384736", ""])
def test_free_memory_whatever_the_gpus_are_called(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-1 and 2 ask for it. DeepSpeed itself takes CUDA_VISIBLE_DEVICES for a list of integers."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("deepspeed.accelerator.cuda_accelerator.pynvml", object())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 80))
    prepare_deepspeed(GPU)
    assert get_accelerator().available_memory() == 5


def test_the_users_log_level_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_LOG_LEVEL", "info")
    logger.setLevel(logging.INFO)
    prepare_deepspeed(CPU)
    assert logger.level == logging.INFO


def test_log_lines_of_every_rank_are_silenced() -> None:
    logger.setLevel(logging.INFO)
    prepare_deepspeed(CPU)
    assert logger.level == logging.ERROR


@pytest.mark.parametrize(
    ("device", "asked", "pushed"),
    [
        (CPU, {}, 0),
        (CPU, {"NVTE_NVTX_ENABLED": "1"}, 0),
        (GPU, {}, 0),
        (GPU, {"NSYS_PROFILING_SESSION_ID": "12"}, 1),
        (GPU, {"NVTE_NVTX_ENABLED": "1"}, 1),
        (GPU, {"NVTE_NVTX_ENABLED": "0", "NSYS_PROFILING_SESSION_ID": "12"}, 0),
    ],
)
def test_ranges_are_marked_where_a_profiler_reads_them(
    device: torch.device, asked: dict[str, str], pushed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    for name, value in asked.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(nvtx, "_range_push", lambda accelerator, name: names.append(name))
    monkeypatch.setattr(nvtx, "_range_pop", lambda accelerator: None)
    prepare_deepspeed(device)
    assert nvtx.instrument_w_nvtx(lambda: 3)() == 3
    assert len(names) == pushed
