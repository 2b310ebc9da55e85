"""Keeps DeepSpeed from compiling C++ when a run starts, and from marking ranges for a profiler that a CPU lacks.

On a CPU DeepSpeed builds a shared-memory communication extension with ninja inside the first
``init_distributed`` (tens of seconds, and a failure where no compiler is installed). gloo does the same work.
Under ZeRO-3 it also enters and leaves thousands of named ranges per step, which only NVIDIA's profiler reads.
"""

from __future__ import annotations

import logging
import os

import torch


def prepare_deepspeed(device: torch.device) -> None:
    """Select the accelerator of ``device``, prevent the build, quieten DeepSpeed's ranges and per-rank log lines.

    Call before the first use of DeepSpeed; values that the user set in the environment win.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed.ops
    from deepspeed.utils import logger, nvtx

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    nvtx.enable_nvtx = device.type != "cpu"
    if "DS_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.ERROR)
