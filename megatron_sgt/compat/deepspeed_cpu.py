"""Keeps DeepSpeed from compiling C++ when a run starts.

On a CPU DeepSpeed builds a shared-memory communication extension with ninja inside the first
``init_distributed`` (tens of seconds, and a failure where no compiler is installed). gloo does the same work.
"""

from __future__ import annotations

import logging
import os

import torch


def prepare_deepspeed(device: torch.device) -> None:
    """Select the accelerator of ``device``, prevent the build, quieten DeepSpeed's per-rank log lines.

    Call before the first use of DeepSpeed; values that the user set in the environment win.
    """
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed.ops
    from deepspeed.utils import logger

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "DS_LOG_LEVEL" not in os.environ:
        logger.setLevel(logging.ERROR)
