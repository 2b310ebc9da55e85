"""AdamW from the fastest implementation that needs no compiler when the run starts."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from megatron_sgt.config.optim import OptimConfig


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Build AdamW over ``groups`` (see ``parameter_groups``).

    On a GPU NVIDIA Apex's FusedAdam is taken when Apex is installed, else torch's own fused AdamW; both apply
    the whole update in one kernel. (The name ``apex`` on PyPI is an unrelated package without
    ``apex.optimizers``.) On a CPU it is torch's AdamW.
    """
    options: dict[str, Any] = {
        "lr": config.lr,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_eps,
    }
    if device.type == "cpu":
        return torch.optim.AdamW(groups, **options)
    if _has_apex():
        from apex.optimizers import FusedAdam

        return FusedAdam(groups, adam_w_mode=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def _has_apex() -> bool:
    return (
        importlib.util.find_spec("apex") is not None
        and importlib.util.find_spec("apex.optimizers") is not None
    )
