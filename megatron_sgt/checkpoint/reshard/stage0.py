"""ZeRO 0: every data-parallel rank has everything, and the first one has saved it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_sgt.checkpoint.identity import load_file
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, MOMENTS, WEIGHTS, RankState, common_step, saved_average
from megatron_sgt.checkpoint.weight_parts import merged
from megatron_sgt.errors import CheckpointError

PARAMETER_NAMES = "optimizer_parameter_names"
"""Key under which a checkpoint of stage 0 lists its parameters in the order of the optimizer's indices."""


class Stage0State(RankState):
    """Weights from the module, moments from torch's optimizer, whose parameters are numbered."""

    def __init__(self, model_file: Path, averages: Sequence[Path] = ()) -> None:
        content = merged(load_file(model_file), model_file, load_file)
        optimizer = content["optimizer"]
        if "state" not in optimizer:
            raise CheckpointError(f"{model_file}: stage 0 with fp16 cannot be resharded, only fp32")
        names = content[PARAMETER_NAMES]
        self._weights: dict[str, Tensor] = content["module"]
        self._states = {names[index]: state for index, state in optimizer["state"].items()}
        self.shapes = {name: tuple(self._weights[name].shape) for name in names}
        self._averages: dict[str, Tensor] = {}
        if averages:  # of the first data-parallel rank, as all have the same
            saved = saved_average(averages[0], [self._states[name][MOMENTS[0]] for name in names])
            self._averages = dict(zip(names, saved, strict=True))
        self.step = common_step((state["step"] for state in self._states.values()), model_file)

    def read(self, name: str, quantity: str) -> Tensor:
        whole = {WEIGHTS: self._weights, AVERAGE: self._averages}
        return (whole[quantity][name] if quantity in whole else self._states[name][quantity]).detach().float()
