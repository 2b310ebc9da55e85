"""AdamW from the fastest implementation that needs no compiler when the run starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_sgt.config.optim import OptimConfig


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, device: torch.device, offloaded: bool = False
) -> torch.optim.Optimizer:
    """Build AdamW over ``groups`` (see ``parameter_groups``).

    On a GPU NVIDIA Apex's FusedAdam is taken when Apex is installed, else, and on a CPU, torch's own fused AdamW;
    both apply the whole update in one pass over memory. (The name ``apex`` on PyPI is an unrelated package without
    ``apex.optimizers``.)

    Args:
        offloaded: DeepSpeed will keep the state on the CPU and update there, which Apex's kernels cannot.
    """
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    fused_adam = None if offloaded or device.type == "cpu" else _apex_fused_adam()
    if fused_adam is not None:
        return fused_adam(groups, adam_w_mode=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def _apex_fused_adam() -> Callable[..., torch.optim.Optimizer] | None:
    """Apex's class, None without Apex. The unrelated package fails in its own imports: an ImportError as well."""
    try:
        from apex.optimizers import FusedAdam
    except ImportError:
        return None
    return FusedAdam
