"""Counts what makes a host wait for its device, on a machine that has none.

Operators whose result the host must know are seen where they are dispatched, copies to the host where they are called,
and DeepSpeed's own waiting through an accelerator that pretends to have streams and events.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select}
"""Operators whose result, or its shape, the host has to know."""
TO_HOST = {torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy}
"""Methods that copy to the host without such an operator."""


class HostSyncs(TorchDispatchMode):
    """``seen``: what would have made the host wait, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A mask's true places have to be counted to read them, or to write several values; one value just fills.
        by_mask = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        by_mask = by_mask and (len(args) < 3 or args[2].numel() > 1)
        if function.overloadpacket in WAITING or by_mask:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class _Copies(TorchFunctionMode):
    """Adds copies to the host to ``seen``."""

    def __init__(self, seen: list[str]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in TO_HOST:
            self._seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


class _Stream:
    """A stream, or an event on one, of a device that is never ready by itself."""

    def __init__(self, seen: list[str], name: str) -> None:
        self._seen, self._name = seen, name

    def synchronize(self) -> None:
        self._seen.append(f"{self._name}.synchronize")

    def query(self) -> bool:
        return False

    def nothing(self, *args: Any) -> None:
        """Queued work, which no host waits for."""

    wait_stream = wait_event = record = wait = record_event = nothing


def pretend_streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let DeepSpeed take a GPU's branches on this process's CPU from now on; returns where its waits are noted."""
    from deepspeed.accelerator import get_accelerator

    seen: list[str] = []
    here = get_accelerator()
    current, kind = _Stream(seen, "current stream"), type(here)
    pretended = {
        "resolves_data_dependency": lambda self: False,
        "is_synchronized_device": lambda self: False,
        "handles_memory_backpressure": lambda self: False,
        "synchronize": lambda self, device=None: seen.append("device.synchronize"),
        "Stream": property(lambda self: lambda *a, **k: _Stream(seen, "side stream")),
        "Event": property(lambda self: lambda *a, **k: _Stream(seen, "event")),
        "current_stream": lambda self, device=None: current,
        "default_stream": lambda self, device=None: current,
        "stream": lambda self, stream: contextlib.nullcontext(),
    }
    for name, value in pretended.items():
        monkeypatch.setattr(kind, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    return seen


@contextlib.contextmanager
def counted(waits: list[str]) -> Iterator[list[str]]:
    """What the host waits for inside the context; ``waits``: what ``pretend_streams`` returned."""
    waits.clear()
    syncs = HostSyncs()
    syncs.seen = waits
    with _Copies(waits), syncs:
        yield waits
