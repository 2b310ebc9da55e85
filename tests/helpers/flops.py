"""torch's FLOP counter, taught the CPU attention kernel that it leaves out."""

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _forward(query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


_forward._get_raw = True  # type: ignore[attr-defined]
_backward._get_raw = True  # type: ignore[attr-defined]


def flop_counter() -> FlopCounterMode:
    """A counter that also counts attention on CPUs, by torch's own formulas for flash attention."""
    return FlopCounterMode(display=False, custom_mapping={_FORWARD: _forward, _BACKWARD: _backward})
