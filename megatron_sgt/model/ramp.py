"""The mask of ``stages.ramp`` in a model that trains, and in weights that leave it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sgt.arch.weights import stage_of
from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError
from megatron_sgt.model.apply_plan import sgt_layers
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.model.hf_weights import shard
from megatron_sgt.model.linear import MaskedColumnParallelLinear
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.stages.ramp import Masked, masked_weights, masks_units


class RampMask:
    """The parts of ``model`` that its configuration's ``growth.ramp`` fades in, on this rank.

    Nothing of it is a parameter or in a state dict.

    Raises:
        ConfigError: the feed-forward layers are built of a module that no mask reaches.
    """

    def __init__(self, model: LanguageModel, config: Config, groups: ParallelGroups) -> None:
        ramp = config.growth.ramp
        assert ramp is not None, "a model without a ramp has no mask"
        self._layers = [layer for layer in sgt_layers(model) if layer.layer_id in ramp.layers]
        self._linears: list[MaskedColumnParallelLinear] = []
        self._new: list[Tensor] = []
        device = model.meter.device  # offloaded weights may lie on the host
        known: dict[object, Tensor] = {}
        for name, masked in masked_weights(config.model, ramp).items():
            module, _, kind = name.rpartition(".")
            if kind != "weight" or not masks_units(masked) or stage_of(masked.weight, model.layout) != groups.pp_rank:
                continue
            linear = model.gpt.get_submodule(module)
            if not isinstance(linear, MaskedColumnParallelLinear):
                raise ConfigError(
                    f"growth.ramp: {module} is a {type(linear).__name__}, in which no mask can fade in units; build it "
                    "as MaskedColumnParallelLinear, or grow with ramp_steps 0"
                )
            shape = (masked.rows, masked.weight.shapes)
            if shape not in known:  # all layers of a model share one
                rows = [_new_rows(masked, place) for place in range(len(masked.rows))]
                known[shape] = shard(masked.weight, rows, config.model, groups.tp_size, groups.tp_rank).to(device)
            self._linears.append(linear)
            self._new.append(known[shape])
        if ramp.old_units is not None and not self._linears:
            raise ConfigError(
                f"growth.ramp.old_units: the record of model.activation {config.model.activation} does not say where "
                "its units are activated, so that no mask can fade new ones in; grow with ramp_steps 0"
            )

    def set(self, value: float) -> None:
        """Multiply by ``value`` from the next forward on; by nothing at 1."""
        for layer in self._layers:
            layer.scale_branches(None if value >= 1 else value)
        masks: dict[int, Tensor] = {}
        for linear, new in zip(self._linears, self._new, strict=True):
            if value < 1 and id(new) not in masks:
                ones = torch.ones(new.shape, dtype=linear.weight.dtype, device=new.device)
                masks[id(new)] = ones.masked_fill_(new, value)
            linear.mask = masks.get(id(new))


def _new_rows(masked: Masked, place: int) -> Tensor:
    """[rows] bool: which of a tensor are new."""
    rows, first = masked.weight.shapes[place][0], masked.rows[place]
    return torch.arange(rows) >= (rows if first is None else first)


def fold(tensors: dict[str, Tensor], masked: Masked, value: float) -> dict[str, Tensor]:
    """A parameter's whole tensors by Hugging Face name, with the mask ``value`` in them: the model needs none then."""
    folded = dict(tensors)
    for name, first in zip(masked.weight.hf, masked.rows, strict=True):
        if first is not None:
            folded[name] = tensors[name].clone()
            folded[name][first:] *= value
    return folded
