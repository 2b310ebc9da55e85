"""AdamW from the fastest implementation that needs no compiler when the run starts; or a registered optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megatron_sgt import extensions
from megatron_sgt.config.optim import OptimConfig

Builder = Callable[[list[dict[str, Any]], OptimConfig, torch.device, bool], torch.optim.Optimizer]
"""(parameter groups, settings, device of the weights, offloaded) -> optimizer.

Each group has ``params`` and ``weight_decay``; the loop sets ``lr`` before every step. ZeRO replaces ``params`` by flat
fp32 shards, so an update must work element by element. ``offloaded``: DeepSpeed will keep the state on the CPU and
update there.
"""


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, device: torch.device, offloaded: bool = False
) -> torch.optim.Optimizer:
    """Build ``config.optimizer`` (of OPTIMIZERS, or a registered ``Builder``) over ``parameter_groups``."""
    name = config.optimizer
    build: Builder = OPTIMIZERS[name] if name in OPTIMIZERS else extensions.load("optimizers", name)
    return build(groups, config, device, offloaded)


def _adamw(
    groups: list[dict[str, Any]], config: OptimConfig, device: torch.device, offloaded: bool
) -> torch.optim.Optimizer:
    """On a GPU NVIDIA Apex's FusedAdam where Apex is installed, else, and on a CPU, torch's own fused AdamW.

    Both apply the whole update in one pass over memory. Apex's kernels cannot update on the CPU. (The name ``apex`` on
    PyPI is an unrelated package without ``apex.optimizers``.)
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


OPTIMIZERS: dict[str, Builder] = {"adamw": _adamw}
