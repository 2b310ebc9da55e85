"""The module in the activation slot of Megatron-Core's MLP, used where the activation is not compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sgt.ops.swiglu import swiglu


class SwiGLU(torch.nn.Module):
    """[S, B, 2 F] -> [S, B, F], as Megatron-Core's own, bit for bit."""

    def __init__(self, **_: object) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """silu(first half) · second half."""
        return swiglu(x)
