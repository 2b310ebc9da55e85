"""Floating-point operations of a part of the model, and what follows for a training step.

Conventions, which are those of ``torch.utils.flop_counter``: a product [m, k] x [k, n] counts 2mkn; only
matrix products and attention count; causal attention counts as if it were full. Then

    backward             2 · linear  +  2.5 · attention   (flash attention computes the scores again)

Model FLOPs, the numerator of MFU, count 3 · forward of linear and attention (PaLM, arXiv 2204.02311,
appendix B): recomputed scores and the entropy are overhead, loop passes are part of the model.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Flops:
    """Forward operations by kind, and what follows for a training step. Unit: operations."""

    linear: int = 0
    attention: int = 0
    entropy: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention, self.entropy + other.entropy)

    @property
    def forward(self) -> int:
        return self.linear + self.attention + self.entropy

    @property
    def backward(self) -> int:
        """All operations of the backward pass, recomputed scores included."""
        return 2 * self.linear + 5 * self.attention // 2

    @property
    def executed(self) -> int:
        """Forward and backward as the device executes and torch's counter counts them."""
        return self.forward + self.backward

    @property
    def model(self) -> int:
        """Model FLOPs of a training step: 3 · (linear + attention)."""
        return 3 * (self.linear + self.attention)
