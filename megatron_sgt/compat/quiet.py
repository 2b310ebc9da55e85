"""Keeps what DeepSpeed and Megatron-Core say at import, on every rank, off the user's console."""

from __future__ import annotations

import logging
import os
import warnings

import torch

NO_NEWS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # the way from it is in docs/design.md
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # a compiler on a machine without a GPU
}
"""Logger -> beginning of the message of it that tells a user nothing."""


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
    for name in NO_NEWS:
        logging.getLogger(name).addFilter(is_news)  # a filter that is there already is not added again
    # torch shall ask the driver's library whether there is a GPU: the runtime would start CUDA for it, too early for
    # the environment that the run sets (launch/job_environment.py).
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if os.environ.get("DS_ACCELERATOR") not in (None, "cpu", "cuda"):
        warnings.warn(f"DS_ACCELERATOR={os.environ.pop('DS_ACCELERATOR')} is ignored", stacklevel=2)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # looking for others ends in a warning per rank


def is_news(record: logging.LogRecord) -> bool:
    """Whether a library's log line is for the user."""
    return not str(record.msg).startswith(NO_NEWS[record.name])
