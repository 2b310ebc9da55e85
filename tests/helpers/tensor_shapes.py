"""Records the shape of every tensor that torch's operations return."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ShapeRecorder(TorchDispatchMode):
    """Inside this context, forward and backward, every output's shape is noted with its operation."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[str, tuple[int, ...]]] = set()
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.count += 1
                self.shapes.add((str(func), tuple(leaf.shape)))
        return out

    def with_twice(self, size: int) -> list[tuple[str, tuple[int, ...]]]:
        """Operations with an output that has ``size`` as a factor of two dimensions, or twice of one."""
        return sorted(
            (name, shape)
            for name, shape in self.shapes
            if sum((n % size == 0) + (n % size**2 == 0) for n in shape if n) > 1
        )
