"""A second device on a machine that has one: which tensors would lie on it, and what torch and NCCL would refuse.

Inside ``TwoDevices`` a tensor is on the fake GPU when it was made or moved there (``device=GPU``, ``.to(GPU)``), or
computed from one that is. Its numbers are on the CPU all the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda", 0)
HOST = torch.device("cpu")


def device_of(tensor: Tensor) -> torch.device:
    """Where the tensor would be."""
    return GPU if getattr(tensor, "_fake_gpu", False) else HOST


def on_gpu(tensor: Tensor) -> Tensor:
    """The tensor, now on the fake GPU."""
    tensor._fake_gpu = True  # type: ignore[attr-defined]
    return tensor


class TwoDevices(TorchFunctionMode):
    """Raises as torch does where tensors of both devices meet (scalars may); follows ``.to`` and factories."""

    def __torch_function__(
        self, function: Any, types: Any, arguments: Sequence[Any] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = dict(keywords or {})
        if function == torch.Tensor.device.__get__:
            return device_of(arguments[0])
        asked = [value for value in (*arguments, keywords.get("device")) if isinstance(value, torch.device)]
        places = [device_of(t) for t in _tensors((arguments, keywords)) if t.dim() or function is torch.stack]
        if len(set(places)) > 1:
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(map(str, places))}")
        found = any(device_of(t) == GPU for t in _tensors((arguments, keywords)))
        if function is torch.Tensor.cpu or asked:
            found = bool(asked) and asked[0] == GPU
            if "device" in keywords:
                keywords["device"] = HOST
            arguments = [HOST if isinstance(a, torch.device) else a for a in arguments]
        result = function(*arguments, **keywords)
        if asked and isinstance(result, Tensor) and any(result is a for a in arguments):
            result = result.detach().view_as(result)  # a tensor of its own, that is elsewhere
        for tensor in _tensors(result):
            if found:
                on_gpu(tensor)
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
