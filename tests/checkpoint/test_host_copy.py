"""Copies in host memory: equal to the bit, written as the same bytes, and not touched by what comes after."""

from __future__ import annotations

import gc
import io
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.host_copy import Arena, host_copy
from megatron_sgt.errors import CheckpointError
from megatron_sgt.parallel.device import lock_pages


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


class Locked:
    """Counts page-locked bytes as a GPU's driver would hold them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sizes: list[int] = []
        self.pages: dict[int, int] = {}
        plain = torch.empty

        def pinning(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            """torch's pinned allocator takes the next power of two."""
            made = plain(*args, **kwargs)
            if pin_memory:
                self.sizes.append(1 << (made.nbytes - 1).bit_length())
            return made

        monkeypatch.setattr(torch, "empty", pinning)
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        assert flags == 1 and address % os.sysconf("SC_PAGE_SIZE") == 0
        self.sizes.append(num_bytes)
        self.pages[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pages[address]
        return 0


def test_no_more_memory_is_page_locked_than_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state of 20.5 MB, most of it in one buffer, in memory that was reserved for it and in memory that was not."""
    locked = Locked(monkeypatch)
    state = {"flat": torch.arange(20 * 2**18), "rest": [torch.full((2**14,), float(n)) for n in range(8)]}
    needed = sum(t.nbytes for t in (state["flat"], *state["rest"]))
    for reserved in (needed, 0):
        locked.sizes.clear()
        arena = Arena(pinned=True)
        arena.reserve(reserved)
        for _ in range(2):
            assert saved(host_copy(state, arena)) == saved(state)
            arena.reset()
        assert needed <= sum(locked.sizes) <= needed + (1 << 20)
        assert arena.num_bytes == sum(locked.sizes) == sum(locked.pages.values())
        del arena
        gc.collect()
        assert not locked.pages, "memory is given back unlocked"


def test_memory_that_cannot_be_locked_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    locked = Locked(monkeypatch)
    monkeypatch.setattr(locked, "cudaHostRegister", lambda *_: 2)
    with pytest.raises(CheckpointError, match=r"cannot be page-locked .*error 2.*async_save: false"):
        Arena(pinned=True).reserve(1 << 20)
    with pytest.raises(RuntimeError, match="cudaHostRegister: error 2"):
        lock_pages(torch.ones(1))


def test_gaps_are_filled() -> None:
    """What does not fit into the rest of a chunk leaves it to what does."""
    arena = Arena(pinned=False)
    arena.reserve(1 << 20)
    arena.take(1 << 19)
    arena.take(1 << 20)
    held = arena.num_bytes
    arena.take(1 << 19)
    assert arena.num_bytes == held == 2 << 20


def is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = (line.split()[0].split("-") for line in lines)
    return any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def test_a_forked_process_does_not_get_the_memory() -> None:
    """Pages that it shared would be copied at the next write, while a GPU writes to the old ones."""
    arena = Arena(pinned=False)
    arena.reserve(1 << 20)
    address = arena.take(1 << 20).data_ptr()
    assert is_mapped(address)
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, b"mapped" if is_mapped(address) else b"absent")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 6) == b"absent"


def test_attributes_are_copied_with_what_bears_them() -> None:
    """torch pickles them: the versions of modules on a state dict, DeepSpeed's names on its flat tensors."""
    state = torch.nn.Linear(2, 2).state_dict()
    flat = torch.ones(3)
    flat.ds_id = "0_26"  # type: ignore[attr-defined]
    weight = torch.nn.Parameter(torch.ones(2))
    weight.shared = [flat]  # type: ignore[attr-defined]
    value = {"module": state, "flat": flat, "weight": weight}
    copied = host_copy(value, Arena(pinned=False))
    assert saved(copied) == saved(value)
    assert copied["module"]._metadata == state._metadata is not copied["module"]._metadata
    assert copied["weight"].shared[0] is copied["flat"]
