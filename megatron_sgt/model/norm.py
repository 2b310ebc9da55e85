"""Normalisation layers for Megatron's spec slots that run on every device and under sequence parallelism.

Under sequence parallelism each tensor-parallel rank normalises its own shard of the tokens with a replicated
weight, so the weight's gradient is only this rank's part of the sum. Megatron's own optimizer sums the parts
afterwards; DeepSpeed does not, and the loss drifts silently. Reading the weight through
``copy_to_tensor_model_parallel_region`` puts the sum into the graph itself, where it holds for every ZeRO
stage, with accumulation, recompute and repeated passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_sgt.ops.norm import rms_norm, sharded_rms_norm


class _Norm(torch.nn.Module):
    """Base of both norms: a weight (and bias) replicated over tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.sum_over_ranks = config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def replicated(self, parameter: Tensor) -> Tensor:
        """``parameter`` itself; its gradient is summed over the tensor-parallel ranks where they differ."""
        return copy_to_tensor_model_parallel_region(parameter) if self.sum_over_ranks else parameter


class RMSNorm(_Norm):
    """y = x / sqrt(mean(x²) + eps) · w over the last dimension; x [..., hidden_size].

    A fused loop passes the weight to its own kernel, inside a call of the module, through ``use``: see ``linear.py``.
    """

    def forward(self, x: Tensor, use: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Normalise the last dimension of ``x``; or return ``use(x, weight)``."""
        if use is not None:
            return use(x, self.replicated(self.weight))
        return rms_norm(x, self.replicated(self.weight), self.eps)


class LayerNorm(_Norm):
    """y = (x − mean) / sqrt(var + eps) · w + b over the last dimension; x [..., hidden_size]."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.replicated(self.weight), self.replicated(self.bias)
        return F.layer_norm(x, (x.shape[-1],), weight, bias, self.eps)


class HeadNorm(RMSNorm):
    """RMSNorm of queries or keys over the head size (Qwen3-style q/k norm); x [S, B, heads, head_size].

    Its weight is replicated, but each tensor-parallel rank applies it to its own heads: the gradient must be
    summed over the ranks with and without sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        self.sum_over_ranks = config.tensor_model_parallel_size > 1


class AllHeadsNorm(torch.nn.Module):
    """RMSNorm of the queries or keys of all heads together (OLMo-2); x [S, B, heads of this rank, head_size].

    Each tensor-parallel rank has the weights of its own heads; the mean square is that of the heads of all ranks.

    Args:
        heads: of all ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, heads: int, **_: object) -> None:
        super().__init__()
        self.eps, self.ranks = eps, config.tensor_model_parallel_size
        own = torch.ones(heads // self.ranks * hidden_size, dtype=config.params_dtype)
        self.weight = torch.nn.Parameter(own)
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` over its last two dimensions and all ranks; collective where there are several."""
        flat = x.flatten(-2)
        if self.ranks == 1:
            return rms_norm(flat, self.weight, self.eps).view(x.shape)
        group = parallel_state.get_tensor_model_parallel_group()
        return sharded_rms_norm(flat, self.weight, self.eps, group).view(x.shape)


NORMS: dict[str, type[_Norm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
