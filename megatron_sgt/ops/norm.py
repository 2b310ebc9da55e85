"""Root-mean-square normalisation over the last dimension:  y = x / sqrt(mean(x²) + eps) · w."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm through torch's own kernel (fused on GPUs, composite on CPUs).

    Args:
        x: [..., D]. weight: [D]. eps: added to the mean square.
    """
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, in fp32 (or fp64 for fp64 input), rounded once at the end."""
    wide = _wide(x)
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide.dtype)).to(x.dtype)


def sharded_rms_norm(x: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup) -> Tensor:
    """RMSNorm over a dimension of which each rank of ``group`` holds an equal share; collective in both directions.

    Args:
        x: [..., D / ranks]. weight: [D / ranks]. eps: added to the mean square, which is over D.
    """
    return _ShardedRMSNorm.apply(x, weight, eps, group)


class _ShardedRMSNorm(torch.autograd.Function):
    """With r = 1/sqrt(mean(x²) + eps), n = x·r, g = dy·w:  dx = r · (g - n · mean(g·n)),  dw = sum of dy·n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup) -> Tensor:
        wide = _wide(x)
        root = (_mean(wide.square(), group) + eps).rsqrt()
        ctx.save_for_backward(x, weight, root)
        ctx.group = group
        return (wide * root * _wide(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, root = ctx.saved_tensors
        wide, normal = _wide(grad), _wide(x) * root
        scaled = wide * _wide(weight)
        x_grad = root * (scaled - normal * _mean(scaled * normal, ctx.group))
        weight_grad = (wide * normal).flatten(0, -2).sum(0)
        return x_grad.to(x.dtype), weight_grad.to(weight.dtype), None, None


def _mean(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Over the last dimension of all ranks' shares."""
    total = values.sum(-1, keepdim=True)
    dist.all_reduce(total, group=group)
    return total / (values.shape[-1] * dist.get_world_size(group))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype.itemsize == 8 else x.float()
