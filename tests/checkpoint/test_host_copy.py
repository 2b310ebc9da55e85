"""Copies in host memory: equal to the bit, written as the same bytes, and not touched by what comes after."""

from __future__ import annotations

import io
from collections import OrderedDict
from typing import Any

import torch

from megatron_sgt.checkpoint.host_copy import Arena, host_copy


def state() -> dict[str, Any]:
    """What DeepSpeed hands over, in small: views of a flat buffer, shared and empty tensors, plain objects."""
    flat = torch.arange(100.0)
    shared = ["a list", 3]
    return {
        "module": OrderedDict(a=flat[:30].view(5, 6), b=flat[30:100], t=flat.view(10, 10).t()),
        "alias": flat,
        "empty": torch.empty(0),
        "bf16": torch.ones(7, dtype=torch.bfloat16),
        "step": torch.tensor(3.0),
        "flags": torch.tensor([True, False, True]),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "leaf": torch.ones(2, requires_grad=True),
        "tuple": (1, (2.5, None), torch.Size([3, 4])),
        "twice": [shared, shared],
        "set": {1, 2},
    }


def saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_the_file_of_a_copy_is_the_file_of_the_state() -> None:
    original = state()
    before = saved(original)
    copied = host_copy(original, Arena(pinned=False))
    for tensor in (original["alias"], original["bf16"], original["step"]):
        tensor.zero_()
    original["twice"][0].append(4)
    original["set"].add(3)
    assert saved(copied) == before


def test_what_shares_memory_is_copied_once_and_shares_it_still() -> None:
    arena = Arena(pinned=False)
    arena.reserve(1 << 20)
    copied = host_copy(state(), arena)
    module = copied["module"]
    assert module["a"].untyped_storage().data_ptr() == copied["alias"].data_ptr()
    copied["alias"][29] = -1.0
    assert module["a"][4, 5] == -1.0
    assert arena.num_bytes == 1 << 20


def test_memory_is_used_again_and_grows_when_it_must() -> None:
    arena = Arena(pinned=False)
    first = host_copy(torch.ones(1000), arena)
    held = arena.num_bytes
    arena.reset()
    second = host_copy(torch.zeros(1000), arena)
    assert first.data_ptr() == second.data_ptr() and arena.num_bytes == held
    large = host_copy(torch.ones(held), arena)
    assert bool((large == 1).all()) and bool((second == 0).all()) and arena.num_bytes >= 5 * held
    arena.reset()
    arena.reserve(arena.num_bytes)
    pieces = [host_copy(torch.full((held // 8,), float(n)), arena) for n in range(8)]
    assert [float(piece.mean()) for piece in pieces] == list(range(8))


def test_pieces_are_aligned() -> None:
    arena = Arena(pinned=False)
    for size in (1, 3, 65, 0, 7):
        assert arena.take(size).nbytes() == size
    assert arena.take(8).data_ptr() % 8 == 0
