"""Copies of a state in host memory, taken quickly and written while training goes on.

What is copied are storages, each once, as torch.save would write them: the flat buffers of ZeRO are a few large
copies, tensors that share memory still do, and a file written from the copy holds the bytes that it would hold
if it were written from the state. The memory is kept for the next copy: its pages are there, and pinned on GPUs.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

_ALIGNMENT = 64
_LEAST_CHUNK = 1 << 20


class Arena:
    """Host memory in chunks, handed out piece by piece and taken back all at once.

    Args:
        pinned: allocate page-locked memory, to which a GPU copies at full speed.
    """

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned
        self._chunks: list[Tensor] = []
        self._current = 0
        self._used = 0

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(chunk.numel() for chunk in self._chunks)

    def reserve(self, num_bytes: int) -> None:
        """Hold at least so many bytes, their pages touched: the first copy is as fast as the others."""
        missing = num_bytes - self.num_bytes
        if missing > 0:
            self._chunks.append(self._allocate(missing))

    def _allocate(self, num_bytes: int) -> Tensor:
        chunk = torch.empty(max(num_bytes, _LEAST_CHUNK), dtype=torch.uint8, pin_memory=self._pinned)
        return chunk.zero_()

    def take(self, num_bytes: int) -> torch.UntypedStorage:
        """A storage of exactly so many bytes, until ``reset``."""
        if num_bytes == 0:
            return torch.UntypedStorage(0)
        while self._current < len(self._chunks):
            chunk = self._chunks[self._current]
            if self._used + num_bytes <= chunk.numel():
                break
            self._current, self._used = self._current + 1, 0
        else:
            self._chunks.append(self._allocate(num_bytes))
            chunk = self._chunks[-1]
        start = self._used
        self._used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        # A tensor's own slice would share the chunk's storage, which torch.save would write whole.
        piece = torch.frombuffer(chunk.numpy(), dtype=torch.uint8, count=num_bytes, offset=start)
        return piece.untyped_storage()

    def reset(self) -> None:
        """Take everything back: what was copied into it is void."""
        self._current = self._used = 0


def host_copy(value: Any, arena: Arena) -> Any:
    """A copy of ``value`` (tensors in dicts, lists and tuples) in ``arena``'s memory, on the CPU.

    On a GPU the copies are queued: synchronize before they are read.
    """
    return _Copier(arena).copy(value)


class _Copier:
    """Remembers what was copied, so that what was one object or one storage is one again."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._seen: dict[int, Any] = {}
        self._alive: list[Any] = []  # an id is that of one object only as long as this lives

    def copy(self, value: Any) -> Any:
        if id(value) not in self._seen:
            self._alive.append(value)
            self._seen[id(value)] = self._copy(value)
        return self._seen[id(value)]

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, dict):
            copied = type(value)()
            for key, item in value.items():
                copied[key] = self.copy(item)
            return copied
        if type(value) in (list, tuple):
            return type(value)([self.copy(item) for item in value])
        return value if isinstance(value, (str, bytes, int, float, torch.Size)) else copy.deepcopy(value)

    def _tensor(self, tensor: Tensor) -> Tensor:
        source = tensor.detach()
        storage = source.untyped_storage()
        held = self._storages.get(storage._cdata)
        if held is None:
            held = self._storages[storage._cdata] = self._arena.take(storage.nbytes())
            self._alive.append(storage)
            _bytes_of(held).copy_(_bytes_of(storage), non_blocking=True)
        view = torch.empty(0, dtype=source.dtype).set_(
            held, source.storage_offset(), source.size(), source.stride()
        )
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(view, requires_grad=tensor.requires_grad)
        return view.requires_grad_(tensor.requires_grad)


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
