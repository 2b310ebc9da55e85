"""Root-mean-square normalisation over the last dimension:  y = x / sqrt(mean(x²) + eps) · w."""

from __future__ import annotations

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
    wide = x if x.dtype.itemsize == 8 else x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(wide.dtype)).to(x.dtype)
