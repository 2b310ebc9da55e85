"""The growth schedule: from (step, attention entropies) to a LoopPlan and events.

A state machine over a [layer, head] table of EMA entropies; no tensors, no processes. Phases:
vanilla (nothing grown) -> selecting (a window runs, or ends and the next decision falls) -> fixed.
Source: arXiv 2603.23998 and its authors' implementation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.growth.gates import window_gate
from megatron_sgt.growth.plan import Action, GrowthEvent, LayerPlan, LoopPlan
from megatron_sgt.growth.select import choose_heads, layer_scores, next_layer, top_k_layers
from megatron_sgt.growth.state import check_identity, identity

Phase = Literal["vanilla", "selecting", "fixed"]


@dataclass
class Grown:
    """A selected layer: K_l, the heads it keeps for good, and the step at which it chose them."""

    loops: int
    kept_heads: tuple[int, ...]
    chosen_at: int


def memory_steps(ema_decay: float) -> int:
    """Steps after which the EMA has forgotten its past to the precision of fp32.

    What an EMA held n steps ago still weighs beta^n, and entropies lie in [0, 1]: from beta^n <= 2^-24 on, half
    a unit in the last place of 1.0, the past changes no fp32 value. n = ceil(24 ln 2 / -ln beta), at least 1:
    24 steps for beta = 0.5.
    """
    return 1 if ema_decay <= 0.0 else max(1, math.ceil(24 * math.log(2) / -math.log(ema_decay)))


class GrowthSchedule:
    """Grows attention loops from entropies. Per applied optimizer step: fold_entropy, then after_step.

    The plan that after_step(s) leaves behind is what the forward passes of step s+1 execute. Every method
    is deterministic, so ranks that fold the same entropies hold the same plan.
    """

    def __init__(self, config: GrowthConfig, num_layers: int, num_heads: int) -> None:
        self.config = config
        self.num_layers = num_layers
        self.num_heads = num_heads
        self._phase: Phase = "vanilla"
        self._grown: dict[int, Grown] = {}  # in order of selection, which rule 3a depends on
        self._window_end = 0
        self._step = 0
        self._ema: NDArray[np.float64] = np.zeros((num_layers, num_heads))

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def ema(self) -> NDArray[np.float64]:
        """A copy of the EMA entropies [L, H]."""
        return self._ema.copy()

    @property
    def needs_entropy(self) -> bool:
        """Whether the next step's attention entropies will be folded in.

        With exact_ema: false only the last `memory_steps` steps before the next possible decision count.
        """
        if self.config.entropy_after_fixed:
            return True
        if self._phase == "fixed":
            return False
        if self.config.exact_ema:
            return True
        decision = self.config.first_selection_step if self._phase == "vanilla" else self._window_end
        return self._step + 1 > decision - memory_steps(self.config.ema_decay)

    @property
    def plan(self) -> LoopPlan:
        """What the next forward pass must execute."""
        layers = tuple(
            (layer, LayerPlan(grown.loops, grown.kept_heads, self._other_gate(grown)))
            for layer, grown in self._grown.items()
        )
        return LoopPlan(self.num_layers, layers)

    def decides_at(self, step: int) -> bool:
        """True when after_step(step) takes a decision from the EMA; a function of the state alone."""
        if self._phase == "vanilla":
            return step >= self.config.first_selection_step
        return self._phase == "selecting" and step >= self._window_end

    def gates(self) -> NDArray[np.float64]:
        """The gates [L, H] of the next forward pass; 1 for every head of a layer that has no loops."""
        gates = np.ones((self.num_layers, self.num_heads))
        for layer, grown in self._grown.items():
            gates[layer] = self._other_gate(grown)
            gates[layer, list(grown.kept_heads)] = 1.0
        return gates

    def loop_depth(self) -> list[int]:
        """K_l of every layer, layer 0 first."""
        return [self._grown[n].loops if n in self._grown else 0 for n in range(self.num_layers)]

    def fold_entropy(self, entropy: ArrayLike) -> None:
        """EMA <- beta EMA + (1 - beta) e, with one step's entropies e in [0, 1] of the plan just executed.

        entropy [L, P, H], P = 1 + max_loop_depth, is the mean over micro-batches and data-parallel ranks;
        index p is the pass (0 = the ordinary attention), passes that did not run are not read. A kept head
        feeds its last pass K_l, every other head pass 0. A non-finite value leaves its head's EMA as it is.
        Does nothing while needs_entropy is False. Raises ValueError for another shape.
        """
        table = np.asarray(entropy, dtype=np.float64)
        expected = (self.num_layers, 1 + self.config.max_loop_depth, self.num_heads)
        if table.shape != expected:
            raise ValueError(
                f"entropy table of shape {table.shape}, expected [layer, pass, head] = {expected}"
            )
        if not self.needs_entropy:
            return
        fed = table[:, 0, :].copy()
        for layer, grown in self._grown.items():
            kept = list(grown.kept_heads)
            fed[layer, kept] = table[layer, grown.loops, kept]
        beta = self.config.ema_decay
        usable = np.isfinite(fed)
        self._ema[usable] = beta * self._ema[usable] + (1.0 - beta) * fed[usable]

    def after_step(self, step: int) -> list[GrowthEvent]:
        """Moves gates, then takes at most one decision, after the optimizer has applied step `step` (from 1).

        Raises ValueError when the schedule has already acted after this step.
        """
        if step <= self._step:
            raise ValueError(f"growth already acted after step {self._step}; it cannot act after step {step}")
        decides = self.decides_at(step)
        self._step = step
        return [self._decide(step)] if decides else []

    def _decide(self, step: int) -> GrowthEvent:
        cfg = self.config
        scores = layer_scores(self._ema)
        top = top_k_layers(scores, cfg.top_k_layers, cfg.exclude_layers)
        if self._phase == "selecting":
            for layer, grown in self._grown.items():
                if layer in top and grown.loops < cfg.max_loop_depth:
                    grown.loops += 1
                    self._window_end = step + cfg.window_size
                    return self._event(step, "increase_depth", layer, float(scores[layer]))
        full = len(self._grown) >= cfg.max_selected_layers
        chosen = None if full else next_layer(top, self._grown, cfg.direction)
        if chosen is None:
            self._phase = "fixed"
            return self._event(step, "fixed", None, None)
        action: Action = "first_selection" if self._phase == "vanilla" else "select_new_layer"
        key = (cfg.seed, chosen, step)
        kept = choose_heads(self._ema[chosen], cfg.num_keep_heads, cfg.head_choice, key)
        self._grown[chosen] = Grown(1, kept, step)
        self._window_end = step + cfg.window_size
        self._phase = "selecting"
        return self._event(step, action, chosen, float(scores[chosen]))

    def _event(self, step: int, action: Action, layer: int | None, score: float | None) -> GrowthEvent:
        kept = {n: self._grown[n].kept_heads for n in sorted(self._grown)}
        return GrowthEvent(step, action, layer, self._phase, kept, tuple(self.loop_depth()), score)

    def _other_gate(self, grown: Grown) -> float:
        if len(grown.kept_heads) == self.num_heads:
            return 0.0  # no other head exists, so the plan must not change while nothing fades
        return window_gate(self.config.decay_type, self._step, grown.chosen_at, self.config.window_size)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able and exact: after load_state_dict the schedule continues as if never interrupted."""
        grown = [
            {"layer": n, "loops": g.loops, "kept_heads": list(g.kept_heads), "chosen_at": g.chosen_at}
            for n, g in self._grown.items()
        ]
        return {
            **identity(self.config, self.num_layers, self.num_heads),
            "phase": self._phase,
            "step": self._step,
            "window_end": self._window_end,
            "grown": grown,
            "ema": self._ema.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises CheckpointError naming every field in which the checkpoint differs from this run."""
        check_identity(state, self.config, self.num_layers, self.num_heads)
        try:
            ema = np.array(state["ema"], dtype=np.float64)
            grown = {
                int(g["layer"]): Grown(int(g["loops"]), tuple(map(int, g["kept_heads"])), int(g["chosen_at"]))
                for g in state["grown"]
            }
            phase, step, window_end = state["phase"], int(state["step"]), int(state["window_end"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"growth state is damaged: {type(error).__name__}: {error}") from error
        if ema.shape != self._ema.shape or phase not in ("vanilla", "selecting", "fixed"):
            raise CheckpointError(f"growth state is damaged: EMA of shape {ema.shape}, phase {phase!r}")
        self._ema, self._grown, self._phase = ema, grown, phase
        self._step, self._window_end = step, window_end
