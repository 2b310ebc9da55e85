"""Random streams: which ranks draw the same numbers, and how to save and restore them exactly.

Every initial weight has its own stream, ``named_generator``, independent of the layout. Training draws from other
streams: every data-parallel rank has its own on each stage of a pipeline, and within it the tensor-parallel ranks share
one (dropout on replicated activations) and have one each (dropout on sharded activations).
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random

from megatron_sgt.parallel.groups import ParallelGroups

# Arbitrary positive offsets that keep the streams distinct for every realistic number of ranks.
_TENSOR_PARALLEL_OFFSET = 2718
_REPLICA_STRIDE = 1_000_003


def named_generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    """A generator on ``device`` that depends only on ``seed`` and ``name``, and affects no other stream."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def seed_for_training(seed: int, groups: ParallelGroups) -> None:
    """Start the streams of this rank."""
    base = seed + _REPLICA_STRIDE * (groups.dp_rank + groups.dp_size * groups.pp_rank)
    _seed_generators(base)
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add(megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME, base + _TENSOR_PARALLEL_OFFSET + groups.tp_rank)


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
    """Context of a recomputation: Megatron's random streams are in the state they had when this was made.

    Dropout then draws the masks of the forward pass again. torch's checkpoint restores the generator; this restores
    the streams that are not in it, and the name of the one that is: under sequence parallelism Megatron runs all
    layers inside a ``fork``, whose stream lives in the generator, and a ``fork`` within it must find it there.
    Afterwards the streams continue from where they were.
    """

    def __init__(self) -> None:
        self.at_forward = _streams()

    def __enter__(self) -> None:
        self.interrupted = _streams()
        _set_streams(self.at_forward)

    def __exit__(self, *_: object) -> None:
        _set_streams(self.interrupted)


def _streams() -> tuple[dict[str, Any], str]:
    """States of Megatron's streams by name, and the name of the one whose state is in the generator."""
    tracker = megatron_random.get_cuda_rng_tracker()
    return tracker.get_states(), tracker._current_state_name


def _set_streams(streams: tuple[dict[str, Any], str]) -> None:
    tracker = megatron_random.get_cuda_rng_tracker()
    tracker.set_states(dict(streams[0]))
    tracker._current_state_name = streams[1]
