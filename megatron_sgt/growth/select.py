"""Ranking rules: which layers are worth growing and which of their heads keep looping.

Every rule is a pure function of its arguments, so all ranks that see the same entropies decide alike.
Ties go to the lower index everywhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Direction = Literal["deep_to_shallow", "shallow_to_deep"]
HeadChoice = Literal["highest", "lowest", "random", "all"]


def layer_scores(ema: NDArray[np.float64]) -> NDArray[np.float64]:
    """The score of each layer, [L]: the mean of its EMA entropies, ema [layer, head]."""
    return np.asarray(ema, dtype=np.float64).mean(axis=1)


def top_k_layers(scores: NDArray[np.float64], k: int, exclude: Collection[int] = ()) -> list[int]:
    """The k layers of highest score that are not excluded, best first; fewer where fewer exist.

    Of equal scores the shallower layer (lower id) ranks first.
    """
    banned = set(exclude)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    return [int(layer) for layer in order if int(layer) not in banned][:k]


def next_layer(top: Collection[int], selected: Collection[int], direction: Direction) -> int | None:
    """The layer of the top-k that growth takes next, or None when no candidate is left.

    deep_to_shallow: the deepest of those not selected and not deeper than the shallowest selected layer;
    shallow_to_deep is its mirror image. With nothing selected yet every layer of the top-k is a candidate.
    """
    candidates = [layer for layer in top if layer not in selected]
    if direction == "deep_to_shallow":
        bound = min(selected, default=None)
        return max((n for n in candidates if bound is None or n <= bound), default=None)
    bound = max(selected, default=None)
    return min((n for n in candidates if bound is None or n >= bound), default=None)


def choose_heads(
    ema_row: NDArray[np.float64], n: int, rule: HeadChoice, rng_key: tuple[int, int, int]
) -> tuple[int, ...]:
    """The heads of one layer that keep looping, ascending global ids; ema_row holds its [H] EMA entropies.

    highest / lowest: the n heads of highest / lowest EMA entropy; random: n heads, a function of
    rng_key = (seed, layer, step) alone; all: every head, whatever n.

    Raises:
        ValueError: n is not in 1..H or the rule is unknown.
    """
    row = np.asarray(ema_row, dtype=np.float64)
    num_heads = int(row.shape[0])
    if rule == "all":
        return tuple(range(num_heads))
    if not 1 <= n <= num_heads:
        raise ValueError(f"num_keep_heads {n} does not fit {num_heads} heads: choose 1..{num_heads}")
    if rule == "random":
        order = sorted(range(num_heads), key=lambda head: _lottery(rng_key, head))
    elif rule in ("highest", "lowest"):
        sign = -1.0 if rule == "highest" else 1.0
        order = [int(head) for head in np.argsort(sign * row, kind="stable")]
    else:
        raise ValueError(f"head_choice {rule!r}: choose highest, lowest, random or all")
    return tuple(sorted(order[:n]))


def _lottery(rng_key: tuple[int, int, int], head: int) -> bytes:
    # A hash, not a random generator: the draw must not depend on the numpy version of whoever resumes.
    seed, layer, step = rng_key
    return hashlib.sha256(f"{seed}:{layer}:{step}:{head}".encode()).digest()
