"""ZeRO 1 and 2: each parameter group is one flat vector, cut into equal parts.

DeepSpeed concatenates the parameters of a group in the order of ``param_shapes`` (with ``parameter_alignment``,
padding after each), pads the end to a multiple of twice the data-parallel size, and gives every data-parallel rank an
equal part. The end padding is omitted when weights are saved, but not when moments are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


class Stage12State(RankState):
    """Slices of the flat vectors of all data-parallel ranks."""

    def __init__(self, model_file: Path, optimizer_files: Sequence[Path], averages: Sequence[Path] = ()) -> None:
        groups = load_file(model_file)["param_shapes"]
        ranks = [load_file(file)["optimizer_state_dict"] for file in optimizer_files]
        self.shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
        self._where = model_file.parent
        self._place = _places(groups, ranks[0].get("param_alignment_paddings"))
        states = [_group_states(rank) for rank in ranks]
        indices = range(len(groups))
        self._parts: dict[str, list[list[Tensor]]] = {
            WEIGHTS: [[rank["single_partition_of_fp32_groups"][i] for rank in ranks] for i in indices]
        }
        self.step = common_step((state["step"] for rank in states for state in rank), self._where)
        for quantity in MOMENTS:
            self._parts[quantity] = [[rank[i][quantity] for rank in states] for i in indices]
        if averages:
            saved = [
                saved_average(file, [rank[i][MOMENTS[0]] for i in indices])
                for file, rank in zip(averages, states, strict=True)
            ]
            self._parts[AVERAGE] = [[rank[i] for rank in saved] for i in indices]
        self.loss_scale = dynamic_scale(ranks[0])

    def read(self, name: str, quantity: str) -> Tensor:
        group, start = self._place[name]
        end = start + math.prod(self.shapes[name])
        parts = self._parts[quantity][group]
        # The first part has no padding, unless the whole group lies in it.
        size = parts[0].numel()
        found = [
            parts[rank][max(0, start - rank * size) : end - rank * size]
            for rank in range(start // size, min(len(parts), -(-end // size)))
        ]
        whole = torch.cat([parts[0][:0], *found])
        if whole.numel() != end - start:
            raise CheckpointError(
                f"{self._where}: {quantity} of {name} has {whole.numel()} elements, not {end - start}"
            )
        return whole.detach().float().view(self.shapes[name])


def _places(groups: Sequence[dict[str, Any]], paddings: Sequence[Sequence[int]] | None) -> dict[str, tuple[int, int]]:
    places: dict[str, tuple[int, int]] = {}
    for index, group in enumerate(groups):
        offset = 0
        after = paddings[index] if paddings else [0] * len(group)
        for (name, shape), padding in zip(group.items(), after, strict=True):
            places[name] = (index, offset)
            offset += math.prod(shape) + padding
    return places


def _group_states(rank: dict[str, Any]) -> list[dict[str, Any]]:
    """AdamW's state of every group. Apex keeps the step in the group's settings."""
    base = rank["base_optimizer_state"]
    if not isinstance(base, dict):  # with elastic_checkpoint: a list, and one step for all
        common = {} if "base_optimizer_state_step" not in rank else {"step": rank["base_optimizer_state_step"]}
        return [{**common, **state} for state in base]
    settings = base["param_groups"]
    return [
        {"step": settings[index]["step"], **state} if "step" in settings[index] else state
        for index, state in sorted(base["state"].items())
    ]
