"""What growth tells the model: an immutable LoopPlan, and the events that changed it.

A plan is the only thing that crosses from the growth schedule to the modules. It says, per layer, how
often the attention is executed again, which heads keep doing so, and at which gate the other heads still
take part. Vanilla training is the empty plan; the block-loop baseline is a plan that repeats whole layers, and a
sub-net one that skips some.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LayerPhase = Literal["off", "window", "sparse"]


@dataclass(frozen=True)
class LayerPlan:
    """Execution of one layer.

    loops: K_l, the additional attention passes (0 = ordinary layer).
    kept_heads: global query-head ids, ascending, whose gate is 1; they mean something only if loops > 0.
    other_gate: the gate in [0, 1] of every head that is not kept; 0 where no other head exists.
    block_loops: additional executions of the whole layer, attention and MLP (static baseline).
    skipped: the layer is not executed at all: it is no part of the sub-net that is trained.

    Raises:
        ValueError: a value is outside these ranges.
    """

    loops: int = 0
    kept_heads: tuple[int, ...] = ()
    other_gate: float = 0.0
    block_loops: int = 0
    skipped: bool = False

    def __post_init__(self) -> None:
        if self.loops < 0 or self.block_loops < 0:
            raise ValueError(f"loops {self.loops} and block_loops {self.block_loops} must be at least 0")
        if not 0.0 <= self.other_gate <= 1.0:
            raise ValueError(f"other_gate {self.other_gate} lies outside [0, 1]")
        ids = self.kept_heads
        if any(head < 0 for head in ids) or any(a >= b for a, b in pairwise(ids)):
            raise ValueError(f"kept_heads {ids} must be ascending head ids without repetition")
        if self.loops == 0 and (ids or self.other_gate):
            raise ValueError(f"a layer without loops has neither kept heads {ids} nor a gate {self.other_gate}")
        if self.loops and not ids:
            raise ValueError(f"a layer with {self.loops} loops keeps no head")
        if self.skipped and (self.loops or self.block_loops):
            raise ValueError(f"a layer that is skipped has neither loops {self.loops} nor {self.block_loops}")

    @property
    def executions(self) -> int:
        """How often the whole layer is executed."""
        return 0 if self.skipped else 1 + self.block_loops

    @property
    def phase(self) -> LayerPhase:
        """Off: no head loops; window: all heads loop, the others at other_gate; sparse: kept heads only."""
        if self.loops == 0:
            return "off"
        return "window" if self.other_gate > 0.0 else "sparse"


_ORDINARY = LayerPlan()


@dataclass(frozen=True)
class LoopPlan:
    """The layers that are not executed the ordinary way, as (0-based layer id, LayerPlan), ascending.

    Layers may be given in any order; ordinary ones are dropped, so two plans that ask for the same
    execution are equal.

    Raises:
        ValueError: a layer id is outside 0..num_layers-1 or given twice.
    """

    num_layers: int
    layers: tuple[tuple[int, LayerPlan], ...] = ()

    def __post_init__(self) -> None:
        ids = sorted(layer for layer, _ in self.layers)
        if len(set(ids)) < len(ids) or any(not 0 <= layer < self.num_layers for layer in ids):
            raise ValueError(f"layer ids {ids} must be distinct and within 0..{self.num_layers - 1}")
        canonical = sorted(((n, p) for n, p in self.layers if p != _ORDINARY), key=lambda pair: pair[0])
        object.__setattr__(self, "layers", tuple(canonical))

    @classmethod
    def empty(cls, num_layers: int) -> LoopPlan:
        return cls(num_layers)

    def __getitem__(self, layer: int) -> LayerPlan:
        """The plan of one layer; an IndexError outside 0..num_layers-1."""
        if not 0 <= layer < self.num_layers:
            raise IndexError(f"layer {layer} of a plan with {self.num_layers} layers")
        return dict(self.layers).get(layer, _ORDINARY)

    def __iter__(self) -> Iterator[LayerPlan]:
        return (self[layer] for layer in range(self.num_layers))

    @property
    def loops(self) -> tuple[int, ...]:
        return tuple(layer.loops for layer in self)

    def gates(self, num_heads: int) -> NDArray[np.float64]:
        """The gate of every head in a loop pass, [L, H]; 1 for every head of a layer that has no loops."""
        gates = np.ones((self.num_layers, num_heads))
        for n, layer in self.layers:
            if layer.loops:
                gates[n] = layer.other_gate
                gates[n, list(layer.kept_heads)] = 1.0
        return gates

    def inference(self) -> LoopPlan:
        """The plan of a model that is used instead of trained: gate 1 for kept heads, 0 for the others."""
        return replace(self, layers=tuple((n, replace(plan, other_gate=0.0)) for n, plan in self.layers))

    def skipping(self, layers: Collection[int]) -> LoopPlan:
        """The plan of the sub-net that lacks ``layers``."""
        kept = [(n, plan) for n, plan in self.layers if n not in layers]
        return replace(self, layers=(*kept, *((n, LayerPlan(skipped=True)) for n in layers)))

    def fingerprint(self) -> str:
        """SHA-256 (hex) of a canonical text: equal exactly when the plans are equal, on every rank."""
        lines = [f"layers {self.num_layers}"]
        for n, plan in self.layers:
            heads = ",".join(map(str, plan.kept_heads))
            skipped = " skipped" if plan.skipped else ""
            lines.append(f"{n} {plan.loops} [{heads}] {float(plan.other_gate).hex()} {plan.block_loops}{skipped}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able and exact; the inverse of from_dict."""
        layers = {
            str(n): {
                "loops": plan.loops,
                "kept_heads": list(plan.kept_heads),
                "other_gate": plan.other_gate,
                "block_loops": plan.block_loops,
                **({"skipped": True} if plan.skipped else {}),
            }
            for n, plan in self.layers
        }
        return {"num_layers": self.num_layers, "layers": layers}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoopPlan:
        """Rebuild a plan from what ``to_dict`` returned.

        Raises:
            KeyError, ValueError: ``to_dict`` cannot have written it.
        """
        layers = tuple(
            (
                int(n),
                LayerPlan(
                    loops=int(entry["loops"]),
                    kept_heads=tuple(int(head) for head in entry["kept_heads"]),
                    other_gate=float(entry["other_gate"]),
                    block_loops=int(entry["block_loops"]),
                    skipped=bool(entry.get("skipped", False)),
                ),
            )
            for n, entry in data["layers"].items()
        )
        return cls(int(data["num_layers"]), layers)


@dataclass(frozen=True)
class GrowthEvent:
    """One decision of the schedule, with the structure as it is after it.

    step: the optimizer step (from 1) after which it was taken; the next forward obeys it.
    action: a word for it; those of the paper's rule are sgt.Action.
    layer: the layer selected or deepened, None for none in particular; layer_score: its mean EMA entropy in [0, 1].
    kept_heads: of all layers selected so far; loops: K_l of every layer, layer 0 first (``loop_depth`` on disk).
    """

    step: int
    action: str
    layer: int | None
    phase: str
    kept_heads: dict[int, tuple[int, ...]] = field(default_factory=dict)
    loops: tuple[int, ...] = ()
    layer_score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: layer ids become strings, tuples become lists."""
        return {
            "step": self.step,
            "action": self.action,
            "layer": self.layer,
            "phase": self.phase,
            "kept_heads": {str(n): list(heads) for n, heads in sorted(self.kept_heads.items())},
            "loop_depth": list(self.loops),
            "layer_score": self.layer_score,
        }
