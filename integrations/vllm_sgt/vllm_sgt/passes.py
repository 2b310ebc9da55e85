"""The attention passes of an exported model, and which heads of each a tensor-parallel rank attends with.

A layer runs ``1 + block_loops`` times; each time it attends once with all heads, then ``depth`` times with the gates
of its loop, then comes its MLP. Every attention pass has keys and values of its own. Imports nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ALL, KEPT = "all", "kept"
OPTION = "sgt_kv_heads"
"""Entry of the configuration (``--hf-overrides '{"sgt_kv_heads": "kept"}'``): which heads' keys loops cache."""


@dataclass(frozen=True)
class Pass:
    """One attention pass. ``index``: its place among all passes of the model, in the order of execution.

    ``gates``: of the query heads; None: the ordinary pass, all 1.
    """

    index: int
    gates: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Heads:
    """The share of one rank in one pass: key/value groups, counted on the rank, and the gates of their query heads.

    ``gates`` is None where all are 1.
    """

    groups: tuple[int, ...]
    gates: tuple[float, ...] | None


def real_layers(config: Any) -> int:
    """Layers of the network, in both forms: ``num_hidden_layers`` of the serving form counts passes."""
    return int(getattr(config, "sgt_num_layers", None) or config.num_hidden_layers)


def _loop(config: Any, layer: int) -> tuple[dict[str, Any], int, int]:
    """The entry of a layer, attention passes of one execution, and executions."""
    loop = (getattr(config, "sgt_loops", None) or {}).get(str(layer), {})
    return loop, 1 + int(loop.get("depth", 0)), 1 + int(loop.get("block_loops", 0))


def passes_of(config: Any, layer: int) -> tuple[tuple[Pass, ...], ...]:
    """For each execution of the layer, its attention passes in order.

    Raises:
        ValueError: ``sgt_loops`` names a head that does not exist.
    """
    before = [_loop(config, n) for n in range(layer)]
    first = sum(size * runs for _, size, runs in before)
    loop, size, runs = _loop(config, layer)
    kept, other, total = loop.get("heads", []), float(loop.get("other_gate", 0.0)), config.num_attention_heads
    if any(head not in range(total) for head in kept):
        raise ValueError(f"sgt_loops: layer {layer} loops heads {kept} of {total}; export the model again")
    gates = tuple(1.0 if head in kept else other for head in range(total))
    starts = range(first, first + size * runs, size)
    return tuple((Pass(start), *(Pass(start + n, gates) for n in range(1, size))) for start in starts)


def kv_option(config: Any) -> str:
    """The entry of ``OPTION``: "all" (the default) or "kept".

    Raises:
        ValueError: the entry has another value.
    """
    option = getattr(config, OPTION, ALL)
    if option not in (ALL, KEPT):
        raise ValueError(f"{OPTION} is {option!r}; it is {ALL!r} or {KEPT!r}")
    return option


def heads_of(gates: Sequence[float] | None, groups: int, option: str, rank: int = 0, ranks: int = 1) -> Heads:
    """What ``rank`` of ``ranks`` attends with in a pass with these gates of all query heads (None: all 1).

    With "kept", only the groups that hold a head whose gate is not 0. vLLM wants as many on every rank, so a rank
    with fewer takes some of its others, whose gates are 0. More ranks than ``groups`` share a group.

    Raises:
        ValueError: the heads cannot be divided among the ranks.
    """
    if gates is None:
        return Heads(tuple(range(max(1, groups // ranks))), None)
    total = len(gates)
    if total % ranks or (groups % ranks and ranks % groups):
        raise ValueError(f"{total} heads in {groups} groups cannot be divided among {ranks} tensor-parallel ranks")
    own = max(1, groups // ranks)
    size = total // ranks // own  # query heads of a group, on one rank
    used = []
    for n in range(ranks):
        local = gates[n * total // ranks : (n + 1) * total // ranks]
        used.append([g for g in range(own) if option == ALL or any(local[g * size : (g + 1) * size])])
    count = max(len(one) for one in used)
    mine = used[rank]
    mine = sorted(mine + [g for g in range(own) if g not in mine][: count - len(mine)])
    first = rank * total // ranks
    chosen = tuple(float(gates[first + g * size + head]) for g in mine for head in range(size))
    return Heads(tuple(mine), None if all(gate == 1 for gate in chosen) else chosen)
