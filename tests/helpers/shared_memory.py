"""A torch.distributed backend for the ranks of one machine, for tests that would wait for gloo most of the time.

gloo passes data around rings, and each hop wakes two threads: with more ranks than cores a collective of a few
kilobytes takes milliseconds. Here a rank writes its tensors where all others can read them, tells them through a
pipe, waits for them once, and computes its result itself, summing in the order of the ranks, so that all ranks get
the same bits. Every collective is asynchronous only in name: it has finished when it returns.

What is not here raises (torch's own ProcessGroup refuses); group sizes and ranks are torch's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

from tests.helpers.ranks import SHARED_MEMORY

CAPACITY = 1 << 20
"""Bytes that a rank hands over at once; more is handed over in pieces."""

_REDUCTIONS: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    dist.ReduceOp.SUM: torch.Tensor.add_,
    dist.ReduceOp.MAX: lambda one, other: torch.maximum(one, other, out=one),
    dist.ReduceOp.MIN: lambda one, other: torch.minimum(one, other, out=one),
}


def register(folder: Path) -> None:
    """Make the backend known to this process's torch.distributed; all ranks name the same ``folder``."""

    def create(options: Any, _: Any) -> SharedMemoryGroup:
        ranks = options.global_ranks_in_group or range(options.group_size)
        name = f"{options.group_id}_" + "_".join(map(str, ranks))
        return SharedMemoryGroup(options.group_rank, options.group_size, folder / name)

    dist.Backend.register_backend(SHARED_MEMORY, create, extended_api=True, devices=["cpu"])


class _Board:
    """Where the ranks of a group exchange bytes."""

    def __init__(self, path: Path, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        path.mkdir(exist_ok=True)
        # Two areas, used in turn: who enters exchange n has read everything of exchange n - 2.
        count = 2 * size * CAPACITY
        memory = torch.from_file(str(path / "memory"), shared=True, size=count, dtype=torch.uint8)
        self.areas = memory.view(2, size, CAPACITY)
        pipes = [path / f"pipe{peer}" for peer in range(size)]
        for pipe in pipes:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(pipe)
        self.pipes = [os.open(pipe, os.O_RDWR) for pipe in pipes]
        self.arrived = [0] * size
        self.turn = 0

    def exchange(self, data: Tensor) -> Tensor:
        """Hand over ``data`` [at most CAPACITY] uint8 -> [size, len(data)]: everybody's, valid until the next call."""
        area = self.areas[self.turn % 2, :, : len(data)]
        area[self.rank] = data
        self.turn += 1
        self.arrived[self.rank] = self.turn
        for peer, pipe in enumerate(self.pipes):
            if peer != self.rank:
                os.write(pipe, bytes([self.rank]))
        while min(self.arrived) < self.turn:
            for peer in os.read(self.pipes[self.rank], 4096):
                self.arrived[peer] += 1
        return area


class SharedMemoryGroup(dist.ProcessGroup):
    """The collectives that Megatron-Core, DeepSpeed and this project use."""

    def __init__(self, rank: int, size: int, path: Path) -> None:
        super().__init__(rank, size)
        self._board = _Board(path, rank, size)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> dist.Work:
        """Sum, mean, maximum or minimum of each tensor, in place."""
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        for tensor in tensors:
            _assign(tensor, self._reduce(tensor.contiguous().view(-1), op))
        return _finished(tensors)

    allreduce_coalesced = allreduce

    def broadcast(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        """The root's tensors."""
        for tensor in tensors:
            _assign(tensor, self._gather(tensor)[opts.rootRank])
        return _finished(tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """Everybody's tensors."""
        for lists, tensor in zip(outputs, inputs, strict=True):
            for output, values in zip(lists, self._gather(tensor), strict=True):
                _assign(output, values)
        return _finished(outputs)

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> dist.Work:
        """Everybody's tensors, one after the other."""
        _assign(output, self._gather(tensor))
        return _finished([output])

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> dist.Work:
        """``all_gather_single`` of several."""
        for output, tensor in zip(outputs, inputs, strict=True):
            self.all_gather_single(output, tensor)
        return _finished(outputs)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any) -> dist.Work:
        """This rank's part of the sum."""
        parts = self._reduce(tensor.contiguous().view(-1), opts.reduceOp)
        _assign(output, parts.view(self.size(), -1)[self.rank()])
        return _finished([output])

    _reduce_scatter_base = reduce_scatter_single

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any) -> dist.Work:
        """This rank's part of the sum, of parts in a list."""
        for output, parts in zip(outputs, inputs, strict=True):
            whole = torch.cat([part.reshape(-1) for part in parts])
            self.reduce_scatter_single(output, whole, opts)
        return _finished(outputs)

    def reduce(self, tensors: list[Tensor], opts: Any) -> dist.Work:
        """The sum, at the root."""
        for tensor in tensors:
            total = self._reduce(tensor.contiguous().view(-1), opts.reduceOp)
            if self.rank() == opts.rootRank:
                _assign(tensor, total)
        return _finished(tensors)

    def barrier(self, opts: Any = None) -> dist.Work:
        """Wait for everybody."""
        self._board.exchange(torch.zeros(1, dtype=torch.uint8))
        return _finished([])

    def _gather(self, tensor: Tensor) -> Tensor:
        """[size, number of elements]: everybody's ``tensor``."""
        flat = tensor.detach().contiguous().view(-1)
        data = flat.view(torch.uint8)
        if len(data) <= CAPACITY:
            return self._board.exchange(data).view(tensor.dtype)
        pieces = [self._board.exchange(piece).clone() for piece in data.split(CAPACITY)]
        return torch.cat(pieces, dim=1).view(tensor.dtype)

    def _reduce(self, flat: Tensor, op: Any) -> Tensor:
        """``flat`` of all ranks reduced in the order of the ranks."""
        everyone = self._gather(flat)
        mean = op == dist.ReduceOp.AVG  # torch hands over an object that only compares with the names
        combine = next(f for name, f in _REDUCTIONS.items() if (dist.ReduceOp.SUM if mean else op) == name)
        total = everyone[0].clone()
        for other in everyone[1:]:
            combine(total, other)
        return total.div_(self.size()) if mean else total

    def getBackendName(self) -> str:
        """The name that torch shows."""
        return SHARED_MEMORY


def _assign(tensor: Tensor, values: Tensor) -> None:
    """Write ``values`` into ``tensor``, also where autograd watches it."""
    tensor.detach().copy_(values.reshape(tensor.shape))


def _finished(result: Any) -> dist.Work:
    future: Future = Future()
    future.set_result(result)
    return _create_work_from_future(future)
