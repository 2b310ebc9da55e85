"""Bytes of tensors that are alive, whoever holds them: autograd, a checkpoint, a module, an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Inside this context, the storages that operations create are followed, each counted once.

    ``live()``: bytes of those that still exist; ``peak`` (if ``watch_peak``, which takes time): the most there were.
    """

    def __init__(self, watch_peak: bool = False) -> None:
        super().__init__()
        self.watch_peak = watch_peak
        self.peak = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            known = self._storages.get(key)
            # A view of something that is not followed, such as a weight, is nothing new.
            if key not in given and (known is None or known[0].expired()):
                self._storages[key] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live()) if self.watch_peak else 0
        return out

    def live(self) -> int:
        """Bytes of the followed storages that exist now."""
        return sum(size for reference, size in self._storages.values() if not reference.expired())


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
