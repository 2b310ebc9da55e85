"""Suppresses the notes that libraries print on every rank."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch

NO_NEWS = {
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",  # docs/design.md has the way to its successor
    "megatron.core.transformer.transformer_layer": "Rewrapping ModuleSpec",
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # a compiler on a machine without a GPU
}
"""Logger -> beginning of its message that tells a user nothing."""


def quiet_imports() -> None:
    """Before the first import of either library: silence notes; choose DeepSpeed's CPU accelerator without a GPU."""
    # Apex and Transformer Engine are optional here; nobody needs to hear that they are absent.
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", message=".*tp_group is None.*")
    # DeepSpeed's ZeRO calls collectives by names that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    for name in NO_NEWS:
        logging.getLogger(name).addFilter(is_news)  # adding it twice has no effect
    # Makes torch ask the driver's library whether there is a GPU: the runtime would start CUDA for it, before the
    # run has set its environment (launch/job_environment.py).
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if os.environ.get("DS_ACCELERATOR") not in (None, "cpu", "cuda"):
        warnings.warn(f"DS_ACCELERATOR={os.environ.pop('DS_ACCELERATOR')} is ignored", stacklevel=2)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # its search for other accelerators prints a warning per rank


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """Inside, no library logs anything below an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def is_news(record: logging.LogRecord) -> bool:
    """Whether a library's log line is for the user."""
    return not str(record.msg).startswith(NO_NEWS[record.name])
