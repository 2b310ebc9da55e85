"""Schedules that never grow (vanilla training, the block-loop baseline), and the choice of a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.growth.plan import GrowthEvent, LayerPlan, LoopPlan
from megatron_sgt.growth.replay import ReplaySchedule
from megatron_sgt.growth.schedule import GrowthSchedule
from megatron_sgt.growth.state import check_identity, identity


class Schedule(Protocol):
    """What training needs of a schedule; GrowthSchedule documents each member."""

    config: GrowthConfig
    num_layers: int
    num_heads: int

    @property
    def plan(self) -> LoopPlan: ...
    @property
    def phase(self) -> str: ...
    @property
    def needs_entropy(self) -> bool: ...
    @property
    def ema(self) -> NDArray[np.float64]: ...
    def decides_at(self, step: int) -> bool: ...
    def fold_entropy(self, entropy: ArrayLike) -> None: ...
    def after_step(self, step: int) -> list[GrowthEvent]: ...
    def gates(self) -> NDArray[np.float64]: ...
    def loop_depth(self) -> list[int]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class StaticSchedule:
    """One plan from the first step to the last: method "vanilla" (empty) or "block_loop".

    No head ever loops, so K_l is 0, every gate is 1 and no entropy is collected; `phase` is "vanilla", or
    "fixed" for the block loop, whose structure is complete from the start. Raises ConfigError for a
    block-loop layer outside the model.
    """

    def __init__(self, config: GrowthConfig, num_layers: int, num_heads: int) -> None:
        self.config = config
        self.num_layers = num_layers
        self.num_heads = num_heads
        layers: tuple[tuple[int, LayerPlan], ...] = ()
        if config.method == "block_loop":
            outside = [n for n in config.block_loop_layers if not 0 <= n < num_layers]
            if outside:
                raise ConfigError(
                    f"growth.block_loop_layers {outside} do not exist: choose layers 0..{num_layers - 1}"
                )
            repeated = LayerPlan(block_loops=config.block_loop_count)
            layers = tuple((n, repeated) for n in config.block_loop_layers)
        self._plan = LoopPlan(num_layers, layers)

    @property
    def plan(self) -> LoopPlan:
        return self._plan

    @property
    def phase(self) -> str:
        return "fixed" if self._plan.layers else "vanilla"

    @property
    def needs_entropy(self) -> bool:
        return False

    @property
    def ema(self) -> NDArray[np.float64]:
        return np.zeros((self.num_layers, self.num_heads))

    def decides_at(self, step: int) -> bool:
        return False

    def fold_entropy(self, entropy: ArrayLike) -> None:
        """Does nothing: nothing is decided from entropies."""

    def after_step(self, step: int) -> list[GrowthEvent]:
        return []

    def gates(self) -> NDArray[np.float64]:
        return np.ones((self.num_layers, self.num_heads))

    def loop_depth(self) -> list[int]:
        return [0] * self.num_layers

    def state_dict(self) -> dict[str, Any]:
        return {**identity(self.config, self.num_layers, self.num_heads), "plan": self._plan.to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore; raises CheckpointError when the checkpoint belongs to other settings."""
        check_identity(state, self.config, self.num_layers, self.num_heads)
        if state.get("plan") != self._plan.to_dict():
            raise CheckpointError(f"growth state is damaged: plan {state.get('plan')!r}")


def build_schedule(config: GrowthConfig, num_layers: int, num_heads: int) -> Schedule:
    """The schedule of `config`: one that decides, one that repeats recorded decisions, or one that stands still."""
    if config.method != "sgt":
        return StaticSchedule(config, num_layers, num_heads)
    schedule = GrowthSchedule if config.replay is None else ReplaySchedule
    return schedule(config, num_layers, num_heads)
