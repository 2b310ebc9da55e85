"""SwiGLU:  y = silu(x1) · x2,   x = (x1, x2) along the last dimension  (arXiv 2002.05202).

``swiglu_reference`` is the definition; ``swiglu`` has its values and gradients, bit for bit, and saves only its input.
Autograd would make the halves of the gradient separately and then copy them together, and allocate buffers of that size
each time, which costs a CPU more than the arithmetic. Here each half is written directly to its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """[..., 2 F] -> [..., F]."""
    return _SwiGLU.apply(x)


def swiglu_reference(x: Tensor) -> Tensor:
    """The definition."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        gate_grad, up_grad = out.chunk(2, dim=-1)
        torch.mul(grad, up, out=gate_grad)
        torch.ops.aten.silu_backward.grad_input(gate_grad, gate, grad_input=gate_grad)
        torch.ops.aten.silu.out(gate, out=up_grad)
        up_grad.mul_(grad)
        return out
