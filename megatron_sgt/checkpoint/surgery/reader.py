"""A grown checkpoint that lies nowhere: what a layout-free one would hold, read from the checkpoint before growth.

One tensor is in memory at a time. ``load_into_engine`` takes a ``GrownReader`` as it takes a ``LayoutFreeReader``, and
``offline.py`` writes what it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint.forms import LAYOUT_FREE, read_config, read_state
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader, is_layout_free
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, MOMENTS, WEIGHTS
from megatron_sgt.checkpoint.reshard.source import Source, open_source
from megatron_sgt.checkpoint.surgery.tensors import grown_moment, grown_weight
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.model.hf_weights import shard
from megatron_sgt.model.initial_weights import initial_value
from megatron_sgt.parallel.rng import named_generator
from megatron_sgt.stages.growth import Growth
from megatron_sgt.stages.maps import maps_of
from megatron_sgt.stages.optimizer import Carried

_CPU = torch.device("cpu")


class WholeTensors(Protocol):
    """Whatever holds whole tensors; ``quantities``: which of QUANTITIES, and AVERAGE where there is one."""

    quantities: tuple[str, ...]

    def whole(self, weight: Weight, quantity: str) -> dict[str, Tensor]:
        """A parameter's tensors, fp32, by Hugging Face name."""


class MergedTensors:
    """The tensors of a checkpoint in DeepSpeed's files, of all ranks.

    ``drift``: the largest difference so far between tensor-parallel copies of a replicated parameter.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.quantities = source.quantities
        self.drift = 0.0

    def whole(self, weight: Weight, quantity: str) -> dict[str, Tensor]:
        """See WholeTensors."""
        tensors, drift = self.source.whole(weight, quantity)
        self.drift = max(self.drift, drift)
        return tensors


@dataclass(frozen=True)
class Opened:
    """A checkpoint of any form. ``step``: AdamW's; ``saved``: its JSON state; ``source_layout``: None for an import."""

    folder: Path
    config: Config
    saved: dict[str, Any]
    tensors: WholeTensors
    step: int
    loss_scale: float | None
    source_layout: dict[str, Any] | None


def open_any(folder: Path) -> Opened:
    """Open the checkpoint ``folder``: in DeepSpeed's files, layout-free, or an imported model.

    Raises:
        CheckpointError: it cannot be read, or does not hold the tensors of its own model.
    """
    saved, config = read_state(folder), read_config(folder)
    if not is_layout_free(saved):
        source = open_source(folder)
        tensors = MergedTensors(source)
        return Opened(folder, config, saved, tensors, source.step, source.loss_scale, saved["layout"])
    reader, made = LayoutFreeReader(folder), saved[LAYOUT_FREE]
    for quantity in reader.quantities:
        reader.check_shapes(weights(config.model), quantity)
    return Opened(folder, config, saved, reader, made["optimizer_step"], made["loss_scale"], made.get("source_layout"))


class WeightsReader:
    """The weights of ``tensors`` alone, or their average (``made_of``) as weights: the beginning of a new run."""

    quantities: tuple[str, ...] = (WEIGHTS,)

    def __init__(self, tensors: WholeTensors, made_of: str = WEIGHTS) -> None:
        self._tensors = tensors
        self._made_of = made_of

    def shard(self, weight: Weight, quantity: str, model: ModelConfig, tp_size: int = 1, tp_rank: int = 0) -> Tensor:
        """One rank's shard of a weight, fp32."""
        return shard(weight, list(self._tensors.whole(weight, self._made_of).values()), model, tp_size, tp_rank)


class GrownReader:
    """The tensors of ``growth``'s new model, made of those of ``tensors`` when they are asked for.

    Args:
        carried: what goes on of AdamW.
        seed, stage: new entries are functions of them and of the tensor's name; ``stage``: from 1, how often the model
            has grown.
        made_of: what becomes the new weights: WEIGHTS, or their AVERAGE.

    Raises:
        CheckpointError: there is no average.
        ConfigError: the table of weights does not say how this model can grow.
    """

    def __init__(
        self,
        tensors: WholeTensors,
        growth: Growth,
        carried: Carried,
        seed: int,
        stage: int,
        made_of: str = WEIGHTS,
    ) -> None:
        if made_of not in tensors.quantities:
            raise CheckpointError(
                "the checkpoint holds no average of the weights for the model to grow from; grow from the weights, or "
                "train with train.ema_decay before"
            )
        self._made_of = made_of
        self._tensors = tensors
        self._growth = growth
        self._carried = carried
        self._seed = seed
        self._stage = stage
        self._maps = maps_of(growth)
        keeps = carried.keeps_moments and set(MOMENTS) <= set(tensors.quantities)
        average = (AVERAGE,) if AVERAGE in tensors.quantities else ()
        self.quantities: tuple[str, ...] = (WEIGHTS, *(MOMENTS if keeps else ()), *average)
        """What it holds."""

    def parameters(self) -> tuple[Weight, ...]:
        """Those of the new model."""
        return weights(self._growth.new)

    def shard(self, weight: Weight, quantity: str, model: ModelConfig, tp_size: int = 1, tp_rank: int = 0) -> Tensor:
        """One rank's shard of a parameter's ``quantity``, fp32."""
        return shard(weight, list(self.whole(weight, quantity).values()), model, tp_size, tp_rank)

    def whole(self, weight: Weight, quantity: str) -> dict[str, Tensor]:
        """A parameter's whole tensors of ``quantity``, fp32, by Hugging Face name.

        Raises:
            CheckpointError: the grown model has no such parameter, or its source has another shape.
        """
        made = self._maps.get(weight.megatron)
        if made is None or made.new != weight:
            raise CheckpointError(f"the grown model has no {weight.megatron} of the shapes {list(weight.shapes)}")
        old = self._tensors.whole(made.old, self._made_of if quantity == WEIGHTS else quantity)
        grown: dict[str, Tensor] = {}
        for mapped in made.tensors:
            source = old.pop(mapped.source)
            if quantity in (WEIGHTS, AVERAGE):
                grown[mapped.name] = grown_weight(
                    mapped,
                    source,
                    lambda name=mapped.name: self._initial(weight, name),  # type: ignore[misc]
                    lambda name=mapped.name, shape=mapped.shape: self._noise(name, shape),  # type: ignore[misc]
                )
            else:
                grown[mapped.name] = grown_moment(mapped, source, quantity, self._carried)
        return grown

    def _initial(self, weight: Weight, name: str) -> Tensor:
        return initial_value(weight, name, self._growth.new, self._seed, _CPU, self._stage)

    def _noise(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        if not self._growth.noise:
            return None
        generator = named_generator(self._seed, f"{name} of stage {self._stage}, noise", _CPU)
        return torch.randn(shape, generator=generator) * self._growth.noise
