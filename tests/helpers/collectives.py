"""Counts the collectives and messages of this rank below every wrapper: the c10d operators themselves."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.ranks import SHARED_MEMORY

KINDS = {
    "allreduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "receive",
}
"""c10d operator -> kind. Any other that is met is an error, so that nothing goes uncounted."""
CONTROL_BYTES = 8
"""Flags and norms: collectives of at most so many bytes are counted apart as well."""


class CollectiveCounter(TorchDispatchMode):
    """Inside this context, forward and backward: ``calls`` and payload ``bytes`` by (kind, size of the group).

    The payload is the whole tensor: what an all-gather returns, what a reduce-scatter is given, what an
    all-reduce is called on. Groups of one rank are left out. ``control`` and ``control_calls``: the share of
    collectives of at most CONTROL_BYTES.
    """

    def __init__(self) -> None:
        """Raises: RuntimeError on a backend written in Python, whose calls pass by the operators."""
        super().__init__()
        if dist.get_backend() == SHARED_MEMORY:
            raise RuntimeError("count the collectives of ranks that talk over gloo")
        self.calls: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()
        self.control: Counter[tuple[str, int]] = Counter()
        self.control_calls: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            self._note(name.removeprefix("c10d::").split(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _note(self, operator: str, args: tuple[Any, ...]) -> None:
        (group,) = (g for g in map(_process_group, args) if g is not None)
        if group.size() == 1:
            return
        key = KINDS[operator], group.size()
        size = max(_num_bytes(arg) for arg in args)
        self.calls[key] += 1
        self.bytes[key] += size
        if size <= CONTROL_BYTES:
            self.control_calls[key] += 1
            self.control[key] += size


def _process_group(value: Any) -> dist.ProcessGroup | None:
    if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
        return dist.ProcessGroup.unbox(value)
    return None


def _num_bytes(value: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
