"""Many small host tensors to a device in one copy, which the host does not wait for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

_ALIGNMENT = 64
_Parts = TypeVar("_Parts")


def on_device(parts: _Parts, device: torch.device) -> _Parts:
    """``parts`` with every host tensor on ``device``; tensors that are there already are not copied.

    A copy from ordinary host memory makes the host wait for all queued work; this one goes through
    page-locked memory, which torch keeps until the copy is done.

    Args:
        parts: tensors in lists, tuples and dataclasses; what else they hold is left alone.
    """
    if device.type == "cpu":
        return parts
    found: dict[int, Tensor] = {}
    _mapped(parts, lambda t: found.setdefault(id(t), t) if t.device.type == "cpu" else t)
    if not found:
        return parts
    starts, size = [], 0
    for tensor in found.values():
        starts.append(size)
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    host = torch.empty(size, dtype=torch.uint8)
    for start, tensor in zip(starts, found.values(), strict=True):
        _view(host, start, tensor).copy_(tensor)
    there = _send(host, device)
    moved = {key: _view(there, s, t) for s, (key, t) in zip(starts, found.items(), strict=True)}
    return _mapped(parts, lambda t: moved.get(id(t), t))


def _send(memory: Tensor, device: torch.device) -> Tensor:
    if device.type != "meta":  # there nothing is copied, and there may be no driver that could lock pages
        memory = memory.pin_memory()
    return memory.to(device, non_blocking=True)


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _mapped(value: Any, place: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return place(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(item, place) for item in value])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: _mapped(getattr(value, name), place) for name in fields})
    return value
