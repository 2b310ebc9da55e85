"""Keeps what DeepSpeed and Megatron-Core say at import, on every rank, off the user's console."""

from __future__ import annotations

import os
import warnings

import torch


def quiet_imports() -> None:
    """Silence notes about optional packages; choose DeepSpeed's CPU accelerator where there is no GPU.

    Call before the first import of either library.
    """
    # Apex and Transformer Engine are optional here, and their absence is no news.
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", message=".*tp_group is None.*")
    # DeepSpeed's ZeRO calls collectives by names that torch 2.13 is about to give up.
    warnings.filterwarnings(
        "ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    # torch shall ask the driver's library whether there is a GPU: the runtime would start CUDA for it, too early for
    # the environment that the run sets (launch/job_environment.py).
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if os.environ.get("DS_ACCELERATOR") not in (None, "cpu", "cuda"):
        warnings.warn(f"DS_ACCELERATOR={os.environ.pop('DS_ACCELERATOR')} is ignored", stacklevel=2)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # looking for others ends in a warning per rank
