"""Which parameters decay."""

from __future__ import annotations

from typing import Any

import torch

from megatron_sgt.config.optim import OptimConfig


def parameter_groups(model: torch.nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups for AdamW, each parameter in exactly one.

    ``weight_decay_on: all`` (the paper) gives one group; ``matrices`` puts norms and biases, which are the
    parameters with fewer than two dimensions, into a second group without decay.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if config.weight_decay_on == "all":
        return [{"name": "all", "params": [p for _, p in named], "weight_decay": config.weight_decay}]
    groups = [
        {
            "name": "decay",
            "params": [p for _, p in named if p.dim() >= 2],
            "weight_decay": config.weight_decay,
        },
        {"name": "no_decay", "params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
