"""How much of a sequence's attention is left where no token attends to another document. Pure.

The formulas count a causal product of T tokens as a full one, T². A document of L tokens is a product of its own: L².
Its pairs of query and key are L · (L + 1) / 2, so that the sum of L² over a sequence is 2 · pairs - T.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttendedPairs:
    """Means over the sequences of a run's data.

    Attributes:
        of_length: T and the pairs of query and key in a sequence of T tokens, each token and itself included, for
            every length that the run has. T · (T + 1) / 2 if each sequence is one document.
        padding: share of the tokens that stand for none of the data's.
        later: first steps, ascending, from which on a run reads other data, and the means of that.
    """

    of_length: tuple[tuple[int, float], ...]
    padding: float = 0.0
    later: tuple[tuple[int, AttendedPairs], ...] = ()

    def at(self, step: int) -> AttendedPairs:
        """Those of the data that step ``step`` reads."""
        return next((pairs for first, pairs in reversed(self.later) if first <= step), self)

    def pairs(self, seq_length: int) -> float:
        """In a sequence of ``seq_length`` tokens, one of the lengths of the run."""
        return dict(self.of_length)[seq_length]

    def square(self, seq_length: int) -> float:
        """What stands for T² in the formulas."""
        return 2 * self.pairs(seq_length) - seq_length

    def share(self, seq_length: int) -> float:
        """Of the attention of sequences that are one document each."""
        return self.square(seq_length) / seq_length**2
