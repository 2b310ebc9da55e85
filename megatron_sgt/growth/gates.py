"""Decay of the gate of the heads that a grown layer does not keep.

With r = (s - a) / W, where a is the step at which the layer chose its heads, s the current optimizer step
and W the window in steps, the gate is f(r): it starts at f(0) = 1 and is 0 from r = 1 on.
Source: arXiv 2603.23998 and its authors' implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

DecayType = Literal["linear", "cosine", "exponential"]

_CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda r: 1.0 - r,
    "cosine": lambda r: (1.0 + math.cos(math.pi * r)) / 2.0,
    "exponential": lambda r: 10.0 ** (-8.0 * r),
}


def decay(decay_type: DecayType, r: float) -> float:
    """The gate f(r) in [0, 1] of a head that is not kept, r >= 0 being the elapsed share of the window.

    linear 1 - r; cosine (1 + cos(pi r)) / 2; exponential 10^(-8 r); 0 for r >= 1.

    Raises:
        ValueError: r is negative or ``decay_type`` unknown.
    """
    if decay_type not in _CURVES:
        raise ValueError(f"decay_type {decay_type!r}: choose one of {', '.join(_CURVES)}")
    if r < 0.0:
        raise ValueError(f"r = {r}: a gate cannot be asked for before its window opened")
    return 0.0 if r >= 1.0 else _CURVES[decay_type](r)


def window_gate(decay_type: DecayType, step: int, opened_at: int, window_steps: int) -> float:
    """The gate after optimizer step ``step`` in a window of ``window_steps`` that opened at step ``opened_at``."""
    return decay(decay_type, (step - opened_at) / window_steps)
