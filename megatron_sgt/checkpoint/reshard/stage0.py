"""ZeRO 0: every data-parallel rank has everything, and the first one has saved it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron_sgt.checkpoint.identity import load_file
from megatron_sgt.checkpoint.reshard.rank_state import WEIGHTS, RankState, common_step
from megatron_sgt.checkpoint.weight_parts import merged
from megatron_sgt.errors import CheckpointError

PARAMETER_NAMES = "optimizer_parameter_names"
"""Key under which a checkpoint of stage 0 lists its parameters in the order of the optimizer's indices."""


class Stage0State(RankState):
    """Weights from the module, moments from torch's optimizer, whose parameters are numbered."""

    def __init__(self, model_file: Path) -> None:
        content = merged(load_file(model_file), model_file, load_file)
        optimizer = content["optimizer"]
        if "state" not in optimizer:
            raise CheckpointError(f"{model_file}: stage 0 with fp16 cannot be resharded, only fp32")
        names = content[PARAMETER_NAMES]
        self._weights: dict[str, Tensor] = content["module"]
        self._states = {names[index]: state for index, state in optimizer["state"].items()}
        self.shapes = {name: tuple(self._weights[name].shape) for name in names}
        self.step = common_step((state["step"] for state in self._states.values()), model_file)

    def read(self, name: str, quantity: str) -> Tensor:
        return (self._weights[name] if quantity == WEIGHTS else self._states[name][quantity]).detach().float()
