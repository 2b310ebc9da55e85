"""A layout-free checkpoint: whole tensors, from which every rank reads its shard.

Beside the usual files (sgt_state.json with ``layout`` null, config.yaml, manifest.json) there are for each
quantity (weights, exp_avg, exp_avg_sq; ema where the run kept an average of its weights; all fp32) one or more
safetensors files. Their names are Hugging Face's; the vocabulary has its padding rows, which AdamW updates like the
others. An imported model has only weights: its moments are the zeros of a run's first step.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sgt.arch.weight import Weight
from megatron_sgt.checkpoint.forms import HELD, IMPORTED_FROM, LAYOUT_FREE, read_state
from megatron_sgt.checkpoint.layout import AVERAGE_STATE
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, QUANTITIES, WEIGHTS
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.model.hf_weights import check_shape, shard


def file_name(quantity: str, part: int, parts: int) -> str:
    """File of one part (from 0) of one quantity."""
    return f"{quantity}-{part + 1:05d}-of-{parts:05d}.safetensors"


def is_layout_free(state: dict[str, Any]) -> bool:
    """Whether a checkpoint with this saved state is layout-free."""
    return LAYOUT_FREE in state


class ShardReader(Protocol):
    """What an engine's state is read from; ``quantities``: which of QUANTITIES it holds."""

    quantities: tuple[str, ...]

    def shard(self, weight: Weight, quantity: str, model: ModelConfig, tp_size: int = 1, tp_rank: int = 0) -> Tensor:
        """One rank's shard of a parameter's ``quantity``, fp32."""


class LayoutFreeReader:
    """The tensors of a layout-free checkpoint, mapped from disk.

    Raises:
        CheckpointError: a file is damaged, or a tensor is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file_of: dict[tuple[str, str], Any] = {}
        state = read_state(folder)
        made, average = state[LAYOUT_FREE], (AVERAGE,) if AVERAGE_STATE in state else ()
        usual = (WEIGHTS,) if IMPORTED_FROM in made else (*QUANTITIES, *average)
        self.quantities: tuple[str, ...] = tuple(made.get(HELD, usual))
        """What the folder holds."""
        for quantity in self.quantities:
            for path in sorted(folder.glob(f"{quantity}-*-of-*.safetensors")):
                try:
                    file = safe_open(path, "pt")
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"{path} cannot be read: {error}") from error
                for name in file.keys():  # noqa: SIM118 (the file is no dictionary)
                    self._file_of[quantity, name] = file

    def shard(self, weight: Weight, quantity: str, model: ModelConfig, tp_size: int = 1, tp_rank: int = 0) -> Tensor:
        """One rank's shard of a parameter's ``quantity``, fp32; at most three copies exist in the meantime."""
        return shard(weight, list(self.whole(weight, quantity).values()), model, tp_size, tp_rank)

    def whole(self, weight: Weight, quantity: str) -> dict[str, Tensor]:
        """A parameter's whole tensors of ``quantity``, fp32, by Hugging Face name.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        tensors = {name: self._find(quantity, name).get_tensor(name) for name in weight.hf}
        for name, shape in weight.whole.items():
            check_shape(name, tuple(tensors[name].shape), shape)
        return tensors

    def check_shapes(self, table: Iterable[Weight], quantity: str) -> None:
        """Check that the folder holds ``quantity`` of every weight of ``table``, without reading any.

        Raises:
            CheckpointError: a tensor is missing or has another shape.
        """
        for weight in table:
            for name, shape in weight.whole.items():
                check_shape(name, tuple(self._find(quantity, name).get_slice(name).get_shape()), shape)

    def _find(self, quantity: str, name: str) -> Any:
        try:
            return self._file_of[quantity, name]
        except KeyError:
            raise CheckpointError(f"{self._folder} holds no {quantity} of {name}") from None
