"""Nothing is compiled when a run starts, and the user's environment wins."""

import importlib
import logging
import os
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import logger, nvtx

from megatron_sgt.compat.deepspeed_cpu import prepare_deepspeed

CPU = torch.device("cpu")
# Its package has another attribute of that name: torch itself.
backend = importlib.import_module("deepspeed.comm.torch")


@pytest.fixture(autouse=True)
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process; put back afterwards."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("DS_LOG_LEVEL", raising=False)
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    monkeypatch.setattr(nvtx, "enable_nvtx", True)
    level = logger.level
    monkeypatch.setattr(logger, "level", level)


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


@pytest.mark.parametrize(("device", "name"), [(CPU, "cpu"), (torch.device("cuda", 2), "cuda")])
def test_accelerator(device: torch.device, name: str) -> None:
    prepare_deepspeed(device)
    assert os.environ["DS_ACCELERATOR"] == name


def test_the_users_choices_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "xpu")
    monkeypatch.setenv("DS_LOG_LEVEL", "info")
    logger.setLevel(logging.INFO)
    prepare_deepspeed(CPU)
    assert os.environ["DS_ACCELERATOR"] == "xpu"
    assert logger.level == logging.INFO


def test_log_lines_of_every_rank_are_silenced() -> None:
    logger.setLevel(logging.INFO)
    prepare_deepspeed(CPU)
    assert logger.level == logging.ERROR


@pytest.mark.parametrize(("device", "pushed"), [(CPU, 0), (torch.device("cuda", 0), 1)])
def test_ranges_are_marked_where_a_profiler_reads_them(
    device: torch.device, pushed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    monkeypatch.setattr(nvtx, "_range_push", lambda accelerator, name: names.append(name))
    monkeypatch.setattr(nvtx, "_range_pop", lambda accelerator: None)
    prepare_deepspeed(device)
    assert nvtx.instrument_w_nvtx(lambda: 3)() == 3
    assert len(names) == pushed
