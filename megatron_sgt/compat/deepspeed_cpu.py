"""Makes DeepSpeed use the run's device, and nothing that this device lacks.

DeepSpeed chooses its accelerator when it is imported, and takes the index of its GPU from ``LOCAL_RANK``.
On a CPU it builds a shared-memory communication extension with ninja inside the first ``init_distributed`` (tens of
seconds, and a failure where no compiler is installed); gloo does the same work. On every device it enters
thousands of named ranges per step under ZeRO-3, which only NVIDIA's profiler reads.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
from typing import Any

import torch

LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
"""DeepSpeed uses the first as the index of its GPU, and refuses to start where the second differs."""


def choose_accelerator(kind: str) -> str | None:
    """Make DeepSpeed use the accelerator ``kind``, "cpu" or "cuda"; returns DS_ACCELERATOR if it overrides that.

    Best called before DeepSpeed is imported: it takes the builders of its extensions from the accelerator then.
    """
    told = os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = kind
    if "deepspeed" in sys.modules:
        from deepspeed.accelerator import get_accelerator, set_accelerator

        wanted = _accelerator(kind)
        if get_accelerator() is not wanted:
            set_accelerator(wanted)
    return told if told not in (None, kind) else None


@functools.cache
def _accelerator(kind: str) -> Any:
    if kind == "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        return CPU_Accelerator()
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    class Accelerator(CUDA_Accelerator):
        """DeepSpeed's own, except for the free memory.

        DeepSpeed asks pynvml for it, and assumes that CUDA_VISIBLE_DEVICES holds numbers; they may be UUIDs
        (``GPU-...``, ``MIG-...``).
        """

        def available_memory(self, device_index: int | None = None) -> int:
            return torch.cuda.mem_get_info(device_index)[0]

    return Accelerator()


def prepare_deepspeed(device: torch.device) -> None:
    """Select the accelerator of ``device`` and its index, prevent the build, silence ranges and per-rank log lines.

    Call before the first use of DeepSpeed. A log level set in DS_LOG_LEVEL is kept.
    """
    import deepspeed.ops
    from deepspeed.utils import logger, nvtx

    choose_accelerator(device.type)
    if device.index is not None:
        for name in LOCAL_RANKS:
            if name == "LOCAL_RANK" or name in os.environ:
                os.environ[name] = str(device.index)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    nvtx.enable_nvtx = device.type != "cpu" and profiled()
    if "DS_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.ERROR)


def profiled() -> bool:
    """Whether named ranges are wanted: under Nsight Systems, or as NVTE_NVTX_ENABLED says."""
    asked = os.environ.get("NVTE_NVTX_ENABLED")
    return asked == "1" if asked else "NSYS_PROFILING_SESSION_ID" in os.environ
