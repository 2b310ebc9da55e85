"""Schedules that never grow: vanilla training, and the block-loop baseline."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth.inherit import Inheritance
from megatron_sgt.growth.plan import GrowthEvent, LayerPlan, LoopPlan
from megatron_sgt.growth.schedule import Schedule, Stage


class StaticSchedule(Schedule):
    """One plan from the first step to the last, known before the run. ``label``: its phase in planning."""

    label: ClassVar[str]

    @property
    @abstractmethod
    def plan(self) -> LoopPlan: ...

    def after_step(self, step: int) -> list[GrowthEvent]:
        return []

    def final_plan(self, together: bool = False) -> LoopPlan:
        return self.plan

    def worst_case(self, last_step: int, together: bool = False) -> Iterator[Stage]:
        yield Stage(0, self.label, self.plan)

    def progress(self) -> dict[str, Any]:
        return {"plan": self.plan.to_dict()}

    def restore(self, progress: Mapping[str, Any]) -> None:
        if progress["plan"] != self.plan.to_dict():
            raise ValueError(f"plan {progress['plan']!r}")

    def inherit(self, older: Schedule, grown: Inheritance) -> list[str]:
        """The configuration says everything."""
        return []

    def adopt(self, plan: LoopPlan) -> None:
        if plan != self.plan:
            made = {n: layer.block_loops or list(layer.kept_heads) for n, layer in plan.layers}
            raise ConfigError(
                f"growth.method: is {self.name}, which does not make the loops of the given model, {made}"
            )


class Vanilla(StaticSchedule):
    """No loop at all."""

    name = label = "vanilla"

    @property
    def plan(self) -> LoopPlan:
        return LoopPlan.empty(self.num_layers)

    def describe(self, added: str) -> str:
        return "none (vanilla)"

    @classmethod
    def settings_for(cls, plan: LoopPlan, num_heads: int) -> dict[str, Any] | None:
        return None if plan.layers else {"method": cls.name}


class BlockLoop(StaticSchedule):
    """Whole layers are executed again, from the first step on.

    Raises:
        ConfigError: a layer outside the model.
    """

    name = "block_loop"
    label = "block loop"

    def __init__(self, config: GrowthConfig, num_layers: int, num_heads: int) -> None:
        super().__init__(config, num_layers, num_heads)
        outside = [n for n in config.block_loop_layers if not 0 <= n < num_layers]
        if outside:
            raise ConfigError(f"growth.block_loop_layers {outside} do not exist: choose layers 0..{num_layers - 1}")
        repeated = LayerPlan(block_loops=config.block_loop_count)
        self._plan = LoopPlan(num_layers, tuple((n, repeated) for n in config.block_loop_layers))

    @property
    def plan(self) -> LoopPlan:
        return self._plan

    @property
    def phase(self) -> str:
        return "fixed"

    def describe(self, added: str) -> str:
        return f"block loop of layers {list(self.config.block_loop_layers)}: {added} from the first step"

    @classmethod
    def settings_for(cls, plan: LoopPlan, num_heads: int) -> dict[str, Any] | None:
        counts = {layer.block_loops for _, layer in plan.layers}
        if len(counts) != 1 or 0 in counts or any(plan.loops):
            return None
        return {
            "method": cls.name,
            "block_loop_layers": [n for n, _ in plan.layers],
            "block_loop_count": counts.pop(),
        }
