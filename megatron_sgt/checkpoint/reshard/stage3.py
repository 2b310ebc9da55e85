"""ZeRO 3: every parameter is cut into equal parts, its last part padded.

Rank r's flat vector of a sub-group holds part r of each of the sub-group's parameters, one after the other in
the order of ``param_shapes``; a part has ceil(elements / data-parallel size) elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_sgt.checkpoint.identity import load_file
from megatron_sgt.checkpoint.reshard.rank_state import (
    AVERAGE,
    MOMENTS,
    WEIGHTS,
    RankState,
    common_step,
    dynamic_scale,
    saved_average,
)
from megatron_sgt.errors import CheckpointError


class Stage3State(RankState):
    """Parts of each parameter from the vectors of all data-parallel ranks."""

    def __init__(self, model_file: Path, optimizer_files: Sequence[Path], averages: Sequence[Path] = ()) -> None:
        groups = load_file(model_file)["param_shapes"]
        ranks = [load_file(file)["optimizer_state_dict"] for file in optimizer_files]
        self.shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        self._place: dict[str, tuple[int, int, int]] = {}
        for index, group in enumerate(groups):
            offset = 0
            for name, shape in group.items():
                part = -(-math.prod(shape) // len(ranks))
                self._place[name] = (index, offset, part)
                offset += part
            for rank, file in zip(ranks, optimizer_files, strict=True):
                if rank["fp32_flat_groups"][index].numel() != offset:
                    raise CheckpointError(
                        f"{file}: sub-group {index} has {rank['fp32_flat_groups'][index].numel()} elements, not "
                        f"{offset}; a checkpoint with optimizer offload to NVMe cannot be resharded"
                    )
        base = [rank["optimizer_state_dict"] for rank in ranks]
        self.step = common_step(
            (
                state.get("step", rank["param_groups"][0].get("step"))
                for rank in base
                for state in rank["state"].values()
            ),
            model_file.parent,
        )
        indices = range(len(groups))
        self._parts = {WEIGHTS: [[rank["fp32_flat_groups"][i] for rank in ranks] for i in indices]}
        for quantity in MOMENTS:
            self._parts[quantity] = [[rank["state"][i][quantity] for rank in base] for i in indices]
        if averages:
            saved = [
                saved_average(file, [rank["state"][i][MOMENTS[0]] for i in indices])
                for file, rank in zip(averages, base, strict=True)
            ]
            self._parts[AVERAGE] = [[rank[i] for rank in saved] for i in indices]
        self.loss_scale = dynamic_scale(ranks[0])

    def read(self, name: str, quantity: str) -> Tensor:
        group, offset, part = self._place[name]
        shape = self.shapes[name]
        whole = torch.cat([rank[offset : offset + part] for rank in self._parts[quantity][group]])
        return whole[: math.prod(shape)].detach().float().view(shape)
