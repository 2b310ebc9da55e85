"""What the readers of all ZeRO stages return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sgt.checkpoint.identity import load_file
from megatron_sgt.errors import CheckpointError

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
QUANTITIES = (WEIGHTS, *MOMENTS)
"""What AdamW keeps of every parameter, all fp32 and of the parameter's shape; MOMENTS under torch's names."""
AVERAGE = "ema"
"""The average of the weights, of the same kind: one more quantity, in the checkpoints of runs that keep one."""


class RankState(ABC):
    """The training state of one tensor-parallel rank.

    ``shapes``: of every parameter, by its name in the model. ``step``: AdamW's updates so far.
    ``loss_scale``: fp16's dynamic loss scale, None where there is none.
    """

    shapes: dict[str, tuple[int, ...]]
    step: int
    loss_scale: float | None = None

    @abstractmethod
    def read(self, name: str, quantity: str) -> Tensor:
        """One of QUANTITIES of parameter ``name``, fp32 on the CPU, in the parameter's shape; or its AVERAGE."""


def common_step(steps: Iterable[Any], where: object) -> int:
    """The one step count that all parameters share.

    Raises:
        CheckpointError: there is none or several.
    """
    found = sorted({int(step) for step in steps})
    if not found:
        raise CheckpointError(f"{where} holds no optimizer state: it was saved before the first step")
    if len(found) > 1:
        raise CheckpointError(f"{where}: parameters differ in their AdamW step ({found}); cannot be resharded")
    return found[0]


def saved_average(path: Path, moments: Sequence[Tensor]) -> list[Tensor]:
    """The average of the weights in one rank's file; its tensors have the order and shapes of the rank's ``moments``.

    Raises:
        CheckpointError: the file cannot be read, or they have not.
    """
    tensors: list[Tensor] = load_file(path)["average"]
    found, wanted = [tuple(t.shape) for t in tensors], [tuple(t.shape) for t in moments]
    if found != wanted:
        raise CheckpointError(f"{path} holds no average of these weights: its shapes are {found[:4]}, not {wanted[:4]}")
    return tensors


def dynamic_scale(optimizer: Mapping[str, Any]) -> float | None:
    """The loss scale in a ZeRO optimizer's saved state, if it is a dynamic one."""
    return float(optimizer["loss_scaler"].cur_scale) if optimizer.get("dynamic_loss_scale") else None
