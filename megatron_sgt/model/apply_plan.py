"""Hands a LoopPlan to the layers of a model."""

from __future__ import annotations

from weakref import WeakKeyDictionary, ref

import torch

from megatron_sgt.growth import LoopPlan
from megatron_sgt.model.layer import SGTLayer
from megatron_sgt.parallel.packed_copy import on_device

# Layers are built once. Walking all modules of a deep model takes milliseconds, and training asks several times
# a step. A layer may refer to its model (ZeRO-3's hooks do), so that references to layers would keep the model.
_LAYERS: WeakKeyDictionary[torch.nn.Module, list[ref[SGTLayer]]] = WeakKeyDictionary()


def sgt_layers(model: torch.nn.Module) -> list[SGTLayer]:
    """The model's SGT layers, shallow to deep."""
    if model not in _LAYERS:
        found = [module for module in model.modules() if isinstance(module, SGTLayer)]
        _LAYERS[model] = [ref(layer) for layer in sorted(found, key=lambda layer: layer.layer_id)]
    return [layer for made in _LAYERS[model] if (layer := made()) is not None]


def apply_plan(model: torch.nn.Module, plan: LoopPlan) -> None:
    """Make every layer of ``model`` execute its part of ``plan`` from the next forward on.

    Everything new reaches the device in one copy for all layers: in a decay window every step has new gates.
    """
    changed = [layer for layer in sgt_layers(model) if layer.plan != plan[layer.layer_id]]
    if not changed:
        return
    device = changed[0].self_attention.core_attention.meter.device  # offloaded weights may lie on the host
    passes = on_device([layer.prepare(plan[layer.layer_id]) for layer in changed], device)
    for layer, loop_pass in zip(changed, passes, strict=True):
        layer.execute(plan[layer.layer_id], loop_pass)


def executed_plan(model: torch.nn.Module, others: LoopPlan | None = None) -> LoopPlan:
    """The plan that the layers of ``model`` execute now.

    Args:
        others: what it says of layers that ``model`` lacks, those of other pipeline stages; None: they are ordinary.
    """
    here = {layer.layer_id: layer.plan for layer in sgt_layers(model)}
    num_layers = sgt_layers(model)[0].config.num_layers  # Megatron-Core's, of the whole model
    elsewhere = () if others is None else (pair for pair in others.layers if pair[0] not in here)
    return LoopPlan(num_layers, (*here.items(), *elsewhere))


def begin_step(model: torch.nn.Module) -> None:
    """Tell the layers that the weights may have changed: kept weights are fetched again at their next use."""
    for layer in sgt_layers(model):
        if layer.loop_pass is not None:
            layer.loop_pass.begin_step()


def mark_micro_batch(model: torch.nn.Module, last: bool) -> None:
    """Tell the layers whether the next micro-batch is the step's last, which returns gradients to the owners."""
    for layer in sgt_layers(model):
        if layer.loop_pass is not None:
            layer.loop_pass.mark_micro_batch(last)
