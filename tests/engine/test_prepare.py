"""What comes before DeepSpeed and CUDA, in new processes on a machine whose GPU is pretended."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from megatron_sgt.engine.prepare import prepare_process
from megatron_sgt.launch.environment import discover
from megatron_sgt.launch.rank_info import RankInfo
from tests.compat.test_quiet import run
from tests.helpers.single import small_config

MACHINE = """
import sys, warnings
import torch

warnings.simplefilter("ignore")
touched = []
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda._lazy_init = lambda: touched.append("init")
# Asks the driver, past torch.cuda, whether a graph is being captured.
torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None
"""

TRAIN = (
    MACHINE
    + """
from megatron_sgt.engine.build import build_runtime, start_processes
from deepspeed.accelerator import get_accelerator
from tests.helpers.single import random_batch, small_config
from megatron_sgt.launch.environment import discover

assert get_accelerator().device_name() == "cuda", "as on a machine with a GPU"
assert touched == [], "imports have started CUDA, before its environment is set"
for stage in (1, 3):
    config = small_config(parallel={"device": "cpu", "zero_stage": stage})
    runtime = build_runtime(config, start_processes(config, discover({})))
    loss = runtime.engine(**random_batch(config))
    runtime.engine.backward(loss)
    runtime.engine.step()
    print(stage, runtime.engine.device, get_accelerator().device_name(), touched)
"""
)


def test_training_on_the_cpu_of_a_machine_with_a_gpu() -> None:
    """DeepSpeed has chosen the GPU when it was imported."""
    assert run(TRAIN).stdout.splitlines() == ["1 cpu cpu []", "3 cpu cpu []"]


FIRST = (
    MACHINE
    + """
import megatron_sgt.engine.main as main

real = main.prepare_process
def prepare(config, info):
    early = [name for name in ("deepspeed", "torch._inductor.config", "triton") if name in sys.modules]
    print("imported before:", early)
    real(config, info)
    from deepspeed.ops.op_builder import CPUAdamBuilder
    print(CPUAdamBuilder.__module__)
    sys.exit(0)

main.prepare_process = prepare
main.main(["--config", CONFIG])
"""
)


def test_a_run_prepares_before_it_imports_what_reads_the_environment(tmp_path: Path) -> None:
    """DeepSpeed takes the builders of its extensions, torch its number of compilers, when they are imported."""
    path = tmp_path / "run.yaml"
    path.write_text(small_config(parallel={"device": "cpu"}).to_yaml())
    lines = run(FIRST.replace("CONFIG", repr(str(path))), DS_ACCELERATOR="cuda").stdout.splitlines()
    assert lines[1:] == ["imported before: []", "deepspeed.ops.op_builder.cpu.cpu_adam"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_leftover_is_told_once(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    info = RankInfo(rank, 2, rank, 2, "127.0.0.1", 29500, "torchrun")
    for _ in range(2):
        prepare_process(small_config(parallel={"device": "cpu"}), info)
    warning = "warning: DS_ACCELERATOR=cuda in the environment is ignored: parallel.device decides, here cpu\n"
    assert capsys.readouterr().err == ("" if rank else warning)


def test_as_much_memory_as_allowed_may_be_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_MEMLOCK: (1, 5)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    prepare_process(small_config(parallel={"device": "cpu"}), discover({}))
    assert limits == {resource.RLIMIT_MEMLOCK: (5, 5)}
