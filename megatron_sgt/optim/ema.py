"""The exponential moving average of the weights: one fp32 tensor beside each that the optimizer steps.

Under ZeRO those are this rank's flat parts of the weights, so the average is sharded as they are. After every applied
step average = decay · average + (1 - decay) · weights; n steps after its start, the weights that it started from still
count decay^n. The decay is constant, as in AutoProg (arXiv 2203.14509), which grows from such an average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 24
"""Elements that ``exchange`` holds twice: 64 MB."""


class WeightAverage:
    """The average of ``masters``, the fp32 tensors that the optimizer steps; it starts from their values.

    ``tensors``: the average, of the masters' shapes, where they are.
    """

    def __init__(self, masters: Sequence[Tensor], decay: float) -> None:
        self.decay = decay
        self._masters = list(masters)
        self.tensors = [master.detach().clone() for master in masters]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @torch.no_grad()
    def start(self) -> None:
        """Start anew from the weights as they are."""
        torch._foreach_copy_(self.tensors, self._masters)

    def zeroed(self) -> list[Tensor]:
        """The average, set to zero, as flat views: to be filled in stretches."""
        torch._foreach_zero_(self.tensors)
        return [tensor.view(-1) for tensor in self.tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights after an applied step in."""
        torch._foreach_lerp_(self.tensors, self._masters, 1 - self.decay)

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the average where the optimizer has the weights, and the weights here; twice changes no bit.

        Values move, not memory: DeepSpeed holds views of the masters.
        """
        for average, master in zip(self.tensors, self._masters, strict=True):
            ours, theirs = average.view(-1), master.detach().view(-1)
            for start in range(0, ours.numel(), _CHUNK):
                held = ours[start : start + _CHUNK].clone()
                ours[start : start + _CHUNK] = theirs[start : start + _CHUNK]
                theirs[start : start + _CHUNK] = held

    def state_dict(self) -> dict[str, Any]:
        """What this rank's file of a checkpoint holds."""
        return {"average": self.tensors}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved values.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: they are not those of an average of these shapes.
        """
        for tensor, saved in zip(self.tensors, state["average"], strict=True):
            tensor.view(-1).copy_(saved.view(-1))
