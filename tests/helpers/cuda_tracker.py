"""Megatron-Core's own tracker of random streams, the one that GPU runs use, on the CPU's generator."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_sgt.compat.megatron_cpu import prepare_megatron

TRACKERS = ("the project's", "Megatron's")


@contextlib.contextmanager
def tracker(name: str) -> Iterator[None]:
    """Let Megatron-Core's modules draw through one of ``TRACKERS``; that of the CPU is back at the end."""
    with pytest.MonkeyPatch.context() as patch:
        prepare_megatron(torch.device("cpu"))
        if name == "Megatron's":
            patch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
            patch.setattr(torch.cuda, "manual_seed", torch.manual_seed)
            patch.setattr(megatron_random.logging.getLogger(megatron_random.__name__), "disabled", True)
            own = megatron_random.CudaRNGStatesTracker()
            patch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER", own)
        yield
