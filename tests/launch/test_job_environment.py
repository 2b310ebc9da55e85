"""The table of the environment: rules, the user's own values, and the page that shows it."""

from __future__ import annotations

import ctypes
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config
from megatron_sgt.launch import job_environment
from megatron_sgt.launch.job_environment import (
    VARIABLES,
    compiler_processes,
    cores_of,
    gpu_generation,
    needs_one_queue,
    private_folder,
    script_environment,
    set_environment,
)
from megatron_sgt.launch.rank_info import Launcher, RankInfo
from tests.helpers.single import small_config

PAGE = Path(__file__).parents[2] / "docs/multi-node.md"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def place(launcher: Launcher = "torchrun", local_ranks: int = 8) -> RankInfo:
    return RankInfo(0, local_ranks, 0, local_ranks, "n1", 29500, launcher)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """64 cores, Hopper, a temporary folder of its own."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(job_environment, "gpu_generation", lambda: 9)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))


def environment(config: Config | None = None, gpus: bool = True, **given: str) -> dict[str, str]:
    set_environment(config or small_config(), place(), gpus, given)
    return given


def test_a_rank_on_gpus_gets_the_whole_table(tmp_path: Path) -> None:
    folder = tmp_path / f"megatron_sgt-{os.getuid()}"
    assert environment() == {
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        **dict.fromkeys(ALLOCATOR, "expandable_segments:True"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "NCCL_DEBUG": "WARN",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }
    assert folder.stat().st_mode & 0o777 == 0o700 and (folder / "triton").is_dir()


def test_a_rank_on_cpus_gets_no_variable_of_gpus() -> None:
    assert set(environment(gpus=False)) == {"TOKENIZERS_PARALLELISM", "TORCHINDUCTOR_COMPILE_THREADS"}


def test_twice_is_as_good_as_once() -> None:
    once = environment()
    assert environment(**once) == once


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_user_has_set_stays_under_each_of_its_names(name: str) -> None:
    found = environment(NCCL_DEBUG="INFO", **{name: "max_split_size_mb:128"})
    assert found["NCCL_DEBUG"] == "INFO"
    assert {k: v for k, v in found.items() if k in ALLOCATOR} == {name: "max_split_size_mb:128"}


def test_a_variable_that_the_user_has_set_to_nothing_is_left_out() -> None:
    found = environment(TRITON_CACHE_DIR="", PYTORCH_CUDA_ALLOC_CONF="", UNKNOWN="")
    assert not {"TRITON_CACHE_DIR", *ALLOCATOR} & set(found)
    assert found["UNKNOWN"] == "", "not ours"


@pytest.mark.parametrize(
    ("tensor_parallel", "zero_stage", "generation", "one"),
    [
        (1, 1, 9, False),
        (2, 1, 9, True),
        (2, 2, 8, True),
        (2, 1, None, True),
        (2, 1, 10, False),
        (2, 1, 12, False),
        (2, 3, 9, False),
    ],
)
def test_one_hardware_queue(
    tensor_parallel: int, zero_stage: int, generation: int | None, one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(parallel={"tensor_model_parallel_size": tensor_parallel, "zero_stage": zero_stage})
    assert needs_one_queue(config, generation) is one
    monkeypatch.setattr(job_environment, "gpu_generation", lambda: generation)
    assert environment(config).get("CUDA_DEVICE_MAX_CONNECTIONS") == ("1" if one else None)


@pytest.mark.parametrize(
    ("cores", "local_ranks", "processes"), [(256, 8, 4), (64, 8, 4), (16, 8, 2), (8, 8, 1), (4, 8, 1)]
)
def test_compilers_of_a_host_never_exceed_its_cores(
    cores: int, local_ranks: int, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    assert compiler_processes(cores_of(place(local_ranks=local_ranks), {})) == processes


def test_the_cores_of_a_slurm_task_are_its_own() -> None:
    task = {"SLURM_CPUS_PER_TASK": "3"}
    assert cores_of(place("slurm"), task) == 3
    assert cores_of(place("torchrun"), task) == 8, "torchrun itself is the task"


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code is loaded from it."""
    assert private_folder(tmp_path / "mine/triton") and private_folder(tmp_path / "mine/triton")
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    assert not private_folder(open_to_all / "triton")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    assert not private_folder(tmp_path / "link/triton")
    (tmp_path / "file").touch()
    assert not private_folder(tmp_path / "file/triton")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert not private_folder(tmp_path / "mine/triton")
    assert "TRITON_CACHE_DIR" not in environment()


class Library:
    """NVIDIA's management library with one GPU of compute capability 9.0; ``fails``: the call that goes wrong."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == "nvmlDeviceGetCudaComputeCapability":
                arguments[1]._obj.value = 9
            return int(name == self.fails)

        return call


@pytest.mark.parametrize(
    ("fails", "generation"),
    [
        ("", 9),
        ("nvmlInit_v2", None),
        ("nvmlDeviceGetHandleByIndex_v2", None),
        ("nvmlDeviceGetCudaComputeCapability", None),
    ],
)
def test_the_generation_of_the_gpus(fails: str, generation: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library(fails)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert gpu_generation() == generation
    assert ("nvmlShutdown" in library.calls) is (fails != "nvmlInit_v2")


def test_a_machine_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert gpu_generation() is None


def test_the_script_holds_what_python_cannot_set_for_itself() -> None:
    for gpus in (True, False):
        assert script_environment(small_config(train={"threads_per_rank": None}), gpus) == {
            "OMP_NUM_THREADS": "$SLURM_CPUS_PER_TASK",
            "PYTHONUNBUFFERED": "1",
        }
    assert script_environment(small_config(train={"threads_per_rank": 3}), True)["OMP_NUM_THREADS"] == "3"


def test_the_script_holds_the_users_own() -> None:
    given = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "", "CUDA_DEVICE_MAX_CONNECTIONS": "", "UNKNOWN": ""}
    assert script_environment(small_config(), True, given) == {
        "PYTHONUNBUFFERED": "1",
        "NCCL_DEBUG": "INFO",
        "CUDA_DEVICE_MAX_CONNECTIONS": "",  # the rank must know that it is to leave it out
    }


def test_the_page_shows_the_table() -> None:
    rows = [f"| `{v.name}` | {v.shown} | {v.reason} |" for v in VARIABLES]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in page] == []
