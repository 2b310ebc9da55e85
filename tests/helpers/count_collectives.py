"""Counts what the collectives of a program move, rank by rank.

Every collective of torch.distributed, whatever Python name it was called by or bound to (Megatron-Core and
DeepSpeed keep their own), reaches the dispatcher as an operator of the namespace ``c10d``. A dispatch mode sees
them all there, with their tensors and their group. Convention of the payload, in elements:

    all-gather       its output          broadcast, reduce, send   the tensor
    reduce-scatter   its input           all-to-all, scatter       the input
    all-reduce       twice the tensor    gather                    the output

Groups of one rank move nothing and are left out, as are barriers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class Transfer:
    """One collective as one rank saw it: kind, label of the group, payload in elements and bytes."""

    op: str
    group: str
    elements: int
    bytes: int


# Operator of c10d -> (kind, position of the tensors that count, how often they count).
_OPERATORS: dict[str, tuple[str, int, int]] = {
    "allreduce_": ("all_reduce", 0, 2),
    "allreduce_coalesced_": ("all_reduce", 0, 2),
    "_allgather_base_": ("all_gather", 0, 1),
    "allgather_": ("all_gather", 0, 1),
    "allgather_coalesced_": ("all_gather", 0, 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 0, 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1, 1),
    "reduce_scatter_": ("reduce_scatter", 1, 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1, 1),
    "broadcast_": ("broadcast", 0, 1),
    "reduce_": ("reduce", 0, 1),
    "alltoall_base_": ("all_to_all", 1, 1),
    "alltoall_": ("all_to_all", 1, 1),
    "gather_": ("gather", 0, 1),
    "scatter_": ("scatter", 1, 1),
    "send": ("send", 0, 1),
}
_SILENT = ("barrier", "monitored_barrier_", "recv_", "recv_any_source_", "check_for_nan")


class CollectiveCounter(TorchDispatchMode):
    """Records every collective of its body, forward and backward, in ``transfers``.

    Args:
        labels: process groups by label. A group that is none of these goes by its ranks, "0,2". Two groups of the
            same ranks are told apart.
    """

    def __init__(self, labels: Mapping[str, dist.ProcessGroup]) -> None:
        super().__init__()
        self._labels = {group.group_name: label for label, group in labels.items()}
        self.transfers: list[Transfer] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Record ``func`` if it is a collective, then run it."""
        if func.namespace == "c10d":
            self._record(func._schema, args)
        return func(*args, **(kwargs or {}))

    def _record(self, schema: Any, args: tuple[Any, ...]) -> None:
        name = schema.name.removeprefix("c10d::")
        if name in _SILENT:
            return
        kind, position, times = _OPERATORS[name]  # an unknown collective must not pass uncounted
        index = [argument.name for argument in schema.arguments].index("process_group")
        group = dist.ProcessGroup.unbox(args[index])
        if group.size() == 1:
            return
        tensors = list(_tensors(args[position]))
        self.transfers.append(
            Transfer(
                op=kind,
                group=self._labels.get(group.group_name) or _ranks(group),
                elements=times * sum(t.numel() for t in tensors),
                bytes=times * sum(t.numel() * t.element_size() for t in tensors),
            )
        )

    def take(self) -> list[Transfer]:
        """What was recorded since the last call."""
        taken, self.transfers = self.transfers, []
        return taken


def _ranks(group: dist.ProcessGroup) -> str:
    return ",".join(map(str, dist.get_process_group_ranks(group)))


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    for item in value:
        yield from _tensors(item)


def bytes_by(transfers: Iterable[Transfer], key: Callable[[Transfer], Any]) -> dict[Any, int]:
    """Sum of the bytes per value of ``key``."""
    total: Counter[Any] = Counter()
    for transfer in transfers:
        total[key(transfer)] += transfer.bytes
    return dict(total)
