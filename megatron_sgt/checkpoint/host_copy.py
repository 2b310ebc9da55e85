"""Fast copies of a state in host memory, which are written to disk while training continues.

Storages are copied, each once, as torch.save would write them: the flat buffers of ZeRO are a few large copies, tensors
that share memory still share it, and a file written from the copy has the same bytes as one written from the state. The
memory is kept for the next copy: its pages are already mapped, and page-locked on GPUs.
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from megatron_sgt.errors import CheckpointError
from megatron_sgt.metrics.units import file_size
from megatron_sgt.parallel.device import lock_pages

_ALIGNMENT = 64
_LEAST_CHUNK = 1 << 20

T = TypeVar("T")


class _Chunk:
    """Host memory of one mapping, its pages touched; the first ``used`` bytes are handed out.

    Page-locked memory is a mapping of its own and not torch's: torch's allocator takes the next power of two, 32 GiB
    for 20.5 GB. A forked process (a data loader's) does not get it: else the next write to a page would move this
    process to a copy, while the GPU keeps writing to the original page.
    """

    def __init__(self, num_bytes: int, pinned: bool) -> None:
        mapping = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        mapping.madvise(mmap.MADV_DONTFORK)
        self.used = 0
        self.bytes = torch.frombuffer(mapping, dtype=torch.uint8).zero_()
        if pinned:
            _lock(self.bytes)

    def take(self, num_bytes: int) -> torch.UntypedStorage | None:
        """A storage of exactly ``num_bytes`` bytes; None if there is no room."""
        start = self.used
        if start + num_bytes > len(self.bytes):
            return None
        self.used += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        # A tensor's own slice would share the chunk's storage, which torch.save would write whole.
        piece = torch.frombuffer(self.bytes.numpy(), dtype=torch.uint8, count=num_bytes, offset=start)
        return piece.untyped_storage()


def _lock(memory: Tensor) -> None:
    try:
        lock_pages(memory)
    except RuntimeError as error:
        raise CheckpointError(
            f"asynchronous saves: {file_size(memory.nbytes)} of host memory of this rank cannot be page-locked "
            f"({error}); give the job more memory, or set checkpoint.async_save: false"
        ) from error


class Arena:
    """Host memory handed out in pieces, taken back at once; ``pinned``: page-locked, for fast copies from a GPU."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self._chunks: list[_Chunk] = []

    @property
    def num_bytes(self) -> int:
        return sum(len(chunk.bytes) for chunk in self._chunks)

    def reserve(self, num_bytes: int) -> None:
        """Hold at least ``num_bytes`` bytes, their pages touched, so that the first copy is as fast as the others.

        Raises:
            CheckpointError: memory cannot be page-locked.
        """
        missing = num_bytes - self.num_bytes
        if missing > 0:
            self._grow(missing)

    def _grow(self, num_bytes: int) -> _Chunk:
        self._chunks.append(_Chunk(max(num_bytes, _LEAST_CHUNK), self.pinned))
        return self._chunks[-1]

    def take(self, num_bytes: int) -> torch.UntypedStorage:
        """A storage of exactly ``num_bytes`` bytes, valid until ``reset``."""
        if num_bytes == 0:
            return torch.UntypedStorage(0)
        for chunk in self._chunks:
            if (storage := chunk.take(num_bytes)) is not None:
                return storage
        storage = self._grow(num_bytes).take(num_bytes)
        assert storage is not None
        return storage

    def reset(self) -> None:
        """Take everything back; the copies become invalid."""
        for chunk in self._chunks:
            chunk.used = 0


def compact_copy(tensors: Mapping[str, Tensor], arena: Arena) -> dict[str, Tensor]:
    """Copies of ``tensors`` in ``arena``'s memory, each in a storage of its own, as ``host_copy``'s are not.

    For a few views of a large storage, which torch.save would write whole. Synchronize as for ``host_copy`` if the
    arena is pinned.
    """
    copies = {}
    for name, tensor in tensors.items():
        source = tensor.detach()
        held = torch.empty(0, dtype=source.dtype).set_(arena.take(source.nbytes)).view(source.shape)
        copies[name] = held.copy_(source, non_blocking=arena.pinned)
    return copies


def host_copy(value: Any, arena: Arena) -> Any:
    """A copy of ``value`` (tensors in dicts, lists and tuples) in ``arena``'s memory, on the CPU.

    On a GPU the copies are asynchronous: synchronize before reading them.
    """
    return _Copier(arena).copy(value)


class _Copier:
    """Remembers what was copied, so that shared objects and storages stay shared."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._seen: dict[int, Any] = {}
        self._alive: list[Any] = []  # keeps the ids valid

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
            return self._with_attributes(value, copied)
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
        view = torch.empty(0, dtype=source.dtype).set_(held, source.storage_offset(), source.size(), source.stride())
        if isinstance(tensor, torch.nn.Parameter):
            return self._with_attributes(tensor, torch.nn.Parameter(view, requires_grad=tensor.requires_grad))
        return self._with_attributes(tensor, view.requires_grad_(tensor.requires_grad))

    def _with_attributes(self, value: Any, copied: T) -> T:
        """``copied`` with the attributes of ``value``, which are pickled too.

        The versions of modules on a state dict of torch, DeepSpeed's names of its flat tensors.
        """
        if attributes := getattr(value, "__dict__", None):
            vars(copied).update({name: self.copy(item) for name, item in attributes.items()})
        return copied


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
