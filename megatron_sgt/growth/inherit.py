"""What a schedule must know when the model under it gets more layers or heads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sgt.errors import ConfigError


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
