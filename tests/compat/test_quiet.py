"""What the libraries say at import stays off the console, seen from a new process."""

import os
import subprocess
import sys

import torch

from tests.architecture.source_tree import ROOT

BUILD = """
from megatron_sgt.engine.build import build_runtime, start_processes
from tests.helpers.single import random_batch, small_config
from megatron_sgt.launch.environment import discover

config = small_config(parallel={"device": "cpu", "zero_stage": 1})
runtime = build_runtime(config, start_processes(config, discover({})))
loss = runtime.engine(**random_batch(config))
runtime.engine.backward(loss)
runtime.engine.step()
"""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DS_", "PYTHON"))}
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_importing_building_and_stepping_prints_nothing() -> None:
    done = run(BUILD)
    assert (done.stdout, done.stderr) == ("", "")


QUIET = """
import logging, os, warnings
from megatron_sgt.compat.quiet import NO_NEWS, quiet_imports
quiet_imports()
warnings.warn("the user's own")
for name, beginning in NO_NEWS.items():
    logging.getLogger(name).warning(beginning + " %s", "as always")
    logging.getLogger(name).warning("this is news")
print(os.environ.get("DS_ACCELERATOR"))
"""


def test_other_warnings_are_still_shown_and_the_accelerator_is_chosen() -> None:
    done = run(QUIET)
    assert "UserWarning: the user's own" in done.stderr
    assert done.stderr.count("this is news") == 3 and "as always" not in done.stderr
    assert done.stdout.strip() == ("None" if torch.cuda.is_available() else "cpu")


def test_an_accelerator_that_is_not_supported_is_ignored() -> None:
    """DeepSpeed would raise at its import."""
    done = run(QUIET, DS_ACCELERATOR="hpu")
    assert done.stdout.strip() == ("None" if torch.cuda.is_available() else "cpu")
    assert "DS_ACCELERATOR=hpu is ignored" in done.stderr


ASKED = """
import torch
torch.cuda._is_compiled = lambda: True
torch.cuda._device_count_nvml = lambda: 1
torch._C._cuda_getDeviceCount = lambda: print("CUDA has started") or 1
"""


def test_asking_for_a_gpu_does_not_start_it() -> None:
    """The environment of the run comes after that, and must come before CUDA."""
    done = run(ASKED + QUIET)
    assert done.stdout.strip() == "None", "a GPU, which DeepSpeed finds for itself"
