"""What a schedule must know when the model under it gets more layers or heads, or comes from elsewhere with loops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth.plan import LoopPlan


def refuse_half_measured(step: int, decision: int, memory: int) -> None:
    """Check that a model grows after ``step`` before the ``memory`` steps are measured that ``decision`` rests on.

    Raises:
        ConfigError: it does not, so that a new layer would miss some of them.
    """
    begun = decision - memory
    if begun <= step:
        raise ConfigError(
            f"growth.exact_ema: is false, and the decision of step {decision} rests on the steps from {begun} on, of "
            f"which a layer that is new at step {step} would miss some; grow before step {begun}, or at step {decision}"
        )


def refuse_moved(heads: Iterable[int], grown: Inheritance) -> None:
    """Check that none of the ``heads`` that looping layers keep gets another number.

    Raises:
        ConfigError: some do.
    """
    if moved := grown.moved(heads):
        raise ConfigError(
            f"heads {moved} are kept by looping layers and would get other numbers; let num_query_groups grow in "
            "proportion to num_attention_heads"
        )


def refuse_unlike(plan: LoopPlan, config: GrowthConfig, num_heads: int) -> None:
    """Check that the paper's rule, under the settings ``config``, can have made the loops of ``plan``.

    Raises:
        ConfigError: naming the setting that is too small for them.
    """
    if any(layer.block_loops for layer in plan):
        raise ConfigError(f"growth.method: is {config.method}, but the given model loops whole layers")
    heads = num_heads if config.head_choice == "all" else config.num_keep_heads
    for name, allowed, there in (
        ("max_loop_depth", config.max_loop_depth, max(plan.loops)),
        ("max_selected_layers", config.max_selected_layers, len(plan.layers)),
        ("num_keep_heads", heads, max(len(layer.kept_heads) for layer in plan)),
    ):
        if there > allowed:
            raise ConfigError(f"growth.{name}: is {allowed}, but the loops of the given model need {there}")


@dataclass(frozen=True)
class Inheritance:
    """How the layers and heads of a model come from those of a smaller one.

    Attributes:
        layers: the old layer that each new one is a copy of.
        heirs: for each old layer, the new one that goes on looping if it did.
        heads: the old head that each new one is a copy of, in every layer; -1: of none.
    """

    layers: tuple[int, ...]
    heirs: tuple[int, ...]
    heads: tuple[int, ...]

    def moved(self, heads: Iterable[int]) -> list[int]:
        """Those of the old ``heads`` that have another number now."""
        return sorted({head for head in heads if self.heads[head] != head})

    def entropies(self, table: NDArray[np.float64]) -> NDArray[np.float64]:
        """A table [layer, head] of the new model: a copy's is its source's, a new head's the mean of its layer."""
        rows, heads = table[list(self.layers)], np.array(self.heads)
        return np.where(heads < 0, rows.mean(axis=1, keepdims=True), rows[:, heads])

    def copies_between(self, first: int, end: int | None = None) -> list[int]:
        """New layers from ``first`` up to, and without, ``end`` that are nobody's heirs; None: to the last."""
        return [n for n in range(len(self.layers))[first:end] if n not in self.heirs]
