"""Makes DeepSpeed skip a step when a gradient is not finite on any tensor-parallel rank.

Some of its optimizers check only the norm, which counts replicated parameters on the first tensor-parallel rank: the
non-finite gradient may be another rank's copy. (At stages 1 and 2 the check of every gradient
is an attribute, see engine/build.py.)
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor


def notice_every_copy(optimizer: Any, tp_size: int, tp_rank: int) -> None:
    """Complete the check of BF16_Optimizer (ZeRO-1 with bf16 weights and fp32 gradients) and of ZeRO-3.

    Every rank calls it right after the optimizer is made; it leaves other optimizers alone.
    """
    if isinstance(optimizer, bf16_optimizer.BF16_Optimizer):
        # Hides the builtin from that module, which prints on every rank when it loads a checkpoint.
        bf16_optimizer.print = lambda *words: None
        if tp_rank > 0:
            _add_to_norm(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3) and tp_size > 1:
        _check_at_stage3(optimizer)


def _add_to_norm(optimizer: Any) -> None:
    counted = optimizer.get_grads_for_norm

    def with_every_copy(for_clipping: bool = False) -> Any:
        gradients = counted(for_clipping)
        if not for_clipping:
            gradients[0].append(_zero_if_finite(optimizer.fp32_groups_actual_gradients_flat))
        return gradients

    optimizer.get_grads_for_norm = with_every_copy


def _zero_if_finite(vectors: list[Tensor]) -> Tensor:
    """[number of vectors]: 0, NaN for a vector with an element that is not finite. Waits for no device."""
    return 0.0 * torch.stack([vector.sum() for vector in vectors])


def _check_at_stage3(optimizer: Any) -> None:
    """What stage 3 does for fp16 alone: look at every gradient, and agree with all ranks."""

    def check(update_scale: bool = True) -> bool:
        optimizer.overflow = False
        optimizer.check_overflow()
        if not update_scale:
            return bool(optimizer.overflow)
        return bool(optimizer._loss_scale_update_and_overflow_cleanup())

    optimizer._overflow_check_and_loss_scale_update = check
