"""Reads a checkpoint for export: its model, its structure, its weights one parameter at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.contents import Details, read_contents
from megatron_sgt.checkpoint.forms import read_state
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, WEIGHTS
from megatron_sgt.checkpoint.reshard.source import Source, open_source
from megatron_sgt.config import Config, recorded_config
from megatron_sgt.errors import CheckpointError, SGTError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.model.ramp import fold
from megatron_sgt.stages.ramp import Masked, mask_at, masked_weights


def find_checkpoint(load: Path, step: int | None = None) -> Path:
    """The verified checkpoint ``load`` itself, the one after ``step``, or the latest below ``load``.

    Raises:
        CheckpointError: there is none, or files of it are missing or changed.
    """
    if step is not None and not (load / layout.MANIFEST_FILE).is_file():
        tags = layout.finished_tags(load)
        if layout.tag_for(step) not in tags:
            raise CheckpointError(f"no checkpoint of step {step} in {load}; there are: {', '.join(tags) or 'none'}")
        folder = load / layout.tag_for(step)
    else:
        folder = layout.resolve(load)
    manifest.verify_checksums(folder)
    return folder


@dataclass(frozen=True)
class ExportSource:
    """An opened checkpoint. ``vocab_rows``: rows of the vocabulary that ``read`` returns.

    ``names``: every whole tensor's Hugging Face name and shape, in the order of ``read``. ``quantity``: what it reads,
    the weights or their AVERAGE. ``mask``: by which the model was being faded in (growth.ramp); it is in what ``read``
    returns.
    """

    folder: Path
    config: Config
    details: Details
    vocab_rows: int
    names: dict[str, tuple[int, ...]]
    _weights: Source | LayoutFreeReader
    quantity: str = WEIGHTS
    mask: float = 1.0

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the checkpoint says of its run, beside the weights."""
        return read_state(self.folder)

    @property
    def imported(self) -> dict[str, Any]:
        """What is kept of the model that its run, or the import, began from (inherited.py); empty without one."""
        return self.state.get(layout.IMPORTED_STATE, {})

    def plan(self, training_gates: bool = False) -> LoopPlan:
        """What the model executes: at inference kept heads alone, or with the gates of the step that was saved."""
        plan = self.details.growth.plan
        return plan if training_gates else plan.inference()

    @cached_property
    def _masked(self) -> dict[str, Masked]:
        ramp = self.config.growth.ramp
        return {} if ramp is None else masked_weights(self.config.model, ramp)

    def weights(self) -> tuple[Weight, ...]:
        return weights(self.config.model)

    def read(self, weight: Weight) -> tuple[dict[str, Tensor], float]:
        """One parameter's whole fp32 tensors by Hugging Face name, and by how much its copies differed."""
        if isinstance(self._weights, Source):
            tensors, drift = self._weights.whole(weight, self.quantity)
        else:
            tensors, drift = self._weights.whole(weight, self.quantity), 0.0
        if self.mask < 1 and (masked := self._masked.get(weight.megatron)) is not None:
            tensors = fold(tensors, masked, self.mask)
        if weight.split == "vocab":
            tensors = {name: tensor[: self.vocab_rows] for name, tensor in tensors.items()}
        return tensors, drift


def open_checkpoint(
    load: Path, step: int | None = None, keep_padding: bool = False, averaged: bool = False
) -> ExportSource:
    """Open a checkpoint of any layout, without process group or weights.

    Args:
        keep_padding: of the vocabulary.
        averaged: read the moving average of the weights instead of the weights.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or unreadable, or holds no average.
    """
    folder = find_checkpoint(load, step)
    try:
        contents = read_contents(folder, lambda _: [])
        if contents.details is None:
            raise CheckpointError(f"{folder} cannot be read: {'; '.join(contents.problems)}")
        if averaged and contents.details.ema_decay is None:
            raise CheckpointError(
                f"{folder} holds no average of the weights: its run had train.ema_decay 0; export its weights "
                "(--weights trained)"
            )
        config = recorded_config(folder / layout.CONFIG_FILE).at_step(contents.details.step)
        free = contents.details.layout is None
        reader = LayoutFreeReader(folder) if free else open_source(folder)
    except CheckpointError:
        raise
    except SGTError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    padded = config.model.padded_vocab_size()
    rows = padded if keep_padding else config.model.vocab_size or padded
    names = {
        name: (rows, *shape[1:]) if weight.split == "vocab" else shape
        for weight in weights(config.model)
        for name, shape in weight.whole.items()
    }
    quantity = AVERAGE if averaged else WEIGHTS
    mask = mask_at(config.growth.ramp, contents.details.step)
    return ExportSource(folder, config, contents.details, rows, names, reader, quantity, mask)
