"""Random streams: which ranks draw the same numbers, and how to save and restore them exactly.

Weights are initialised from one stream that is equal on all ranks (so that the initial model does not depend
on the layout); afterwards every data-parallel rank has its own streams, and within it the tensor-parallel
ranks share one (dropout on replicated activations) and have one each (dropout on sharded activations).
"""

from __future__ import annotations

import contextlib
import random
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_sgt.parallel.groups import ParallelGroups

# Any positive offsets that keep the streams apart for every realistic number of ranks.
_TENSOR_PARALLEL_OFFSET = 2718
_DATA_PARALLEL_STRIDE = 1_000_003


def seed_for_initialization(seed: int) -> None:
    """Give all ranks the same streams while the model is built."""
    _seed_generators(seed)
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME, seed + 1)


def seed_for_training(seed: int, groups: ParallelGroups) -> None:
    """Separate the streams of the ranks, after the model was built."""
    base = seed + _DATA_PARALLEL_STRIDE * groups.dp_rank
    _seed_generators(base)
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(
        megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME, base + _TENSOR_PARALLEL_OFFSET + groups.tp_rank
    )


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)  # seeds the CUDA generators too


def rng_state(device: torch.device) -> dict[str, Any]:
    """Everything random that this rank holds, as plain tensors, tuples and numbers."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "tracker": dict(megatron_random.get_cuda_rng_tracker().get_states()),
    }
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def load_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Continue the streams exactly where ``rng_state`` found them."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    megatron_random.get_cuda_rng_tracker().set_states(dict(state["tracker"]))
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)


def recompute_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For ``context_fn`` of torch's checkpoint: contexts of the forward pass and of its recomputation."""
    return contextlib.nullcontext(), _SameStreams()


class _SameStreams:
    """Context of a recomputation: Megatron's random streams stand where they stood when this was made.

    Dropout then draws the masks of the forward pass again (torch's checkpoint restores the default generator
    only). Afterwards the streams go on from where they were.
    """

    def __init__(self) -> None:
        self.at_forward = megatron_random.get_cuda_rng_tracker().get_states()

    def __enter__(self) -> None:
        tracker = megatron_random.get_cuda_rng_tracker()
        self.interrupted = tracker.get_states()
        tracker.set_states(dict(self.at_forward))

    def __exit__(self, *_: object) -> None:
        megatron_random.get_cuda_rng_tracker().set_states(self.interrupted)
