"""Hands a LoopPlan to the layers of a model."""

from __future__ import annotations

import torch

from megatron_sgt.growth import LoopPlan
from megatron_sgt.model.layer import SGTLayer


def sgt_layers(model: torch.nn.Module) -> list[SGTLayer]:
    """The model's SGT layers, shallow to deep."""
    layers = [module for module in model.modules() if isinstance(module, SGTLayer)]
    return sorted(layers, key=lambda layer: layer.layer_id)


def apply_plan(model: torch.nn.Module, plan: LoopPlan) -> None:
    """Make every layer of ``model`` execute its part of ``plan`` from the next forward on."""
    for layer in sgt_layers(model):
        layer.apply_plan(plan[layer.layer_id], layer.self_attention.linear_proj.weight.device)
