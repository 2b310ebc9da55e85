"""The paper's schedule: from (step, attention entropies) to a LoopPlan and events.

A state machine over a [layer, head] table of EMA entropies; no tensors, no processes. Phases:
vanilla (nothing grown) -> selecting (a window runs, or ends and the next decision falls) -> fixed.
Source: arXiv 2603.23998 and its authors' implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_sgt.config.base import count
from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth.gates import window_gate
from megatron_sgt.growth.inherit import Inheritance, refuse_half_measured, refuse_moved, refuse_unlike
from megatron_sgt.growth.plan import GrowthEvent, LayerPlan, LoopPlan
from megatron_sgt.growth.schedule import ENTROPY, Schedule, Stage
from megatron_sgt.growth.select import choose_heads, layer_scores, next_layer, top_k_layers

Phase = Literal["vanilla", "selecting", "fixed"]
Action = Literal["first_selection", "select_new_layer", "increase_depth", "fixed"]


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


class SGTSchedule(Schedule):
    """Grows attention loops from entropies."""

    name = "sgt"

    def __init__(self, config: GrowthConfig, num_layers: int, num_heads: int) -> None:
        super().__init__(config, num_layers, num_heads)
        self._phase: Phase = "vanilla"
        self._grown: dict[int, Grown] = {}  # in order of selection, which rule 3a depends on
        self._window_end = 0
        self._step = 0
        self._ema: NDArray[np.float64] = np.zeros((num_layers, num_heads))

    @property
    def phase(self) -> Phase:
        """See the module."""
        return self._phase

    @property
    def ema(self) -> NDArray[np.float64]:
        """A copy of the EMA entropies [L, H]."""
        return self._ema.copy()

    @property
    def probes(self) -> frozenset[str]:
        return frozenset({ENTROPY})

    @property
    def wanted(self) -> frozenset[str]:
        """Entropies until the structure is fixed, and after it with entropy_after_fixed.

        With exact_ema: false only in the last ``memory_steps`` steps before the next possible decision.
        """
        return self.probes if self._measures() else frozenset()

    @property
    def _measures_all(self) -> bool:
        """Whether every step before the structure is fixed is measured."""
        return self.config.exact_ema or self.config.entropy_after_fixed

    def _measures(self) -> bool:
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

    def observe(self, probe: str, values: ArrayLike) -> None:
        """EMA <- beta EMA + (1 - beta) e, with one step's entropies e [L, P, H] of the plan just executed.

        A kept head feeds its last pass K_l, every other head pass 0. A non-finite value leaves its head's EMA as it
        is. Does nothing while no entropies are wanted.

        Raises:
            ValueError: the entropies have another shape.
        """
        table = np.asarray(values, dtype=np.float64)
        expected = (self.num_layers, 1 + self.max_loops, self.num_heads)
        if table.shape != expected:
            raise ValueError(f"entropy table of shape {table.shape}, expected [layer, pass, head] = {expected}")
        if probe not in self.wanted:
            return
        fed = table[:, 0, :].copy()
        for layer, grown in self._grown.items():
            kept = list(grown.kept_heads)
            fed[layer, kept] = table[layer, grown.loops, kept]
        beta = self.config.ema_decay
        usable = np.isfinite(fed)
        self._ema[usable] = beta * self._ema[usable] + (1.0 - beta) * fed[usable]

    def after_step(self, step: int) -> list[GrowthEvent]:
        """Moves gates, then takes at most one decision, after the optimizer has applied step ``step`` (from 1).

        Raises:
            ValueError: the schedule has already acted after this step.
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
                    return self.event(step, "increase_depth", layer, float(scores[layer]))
        full = len(self._grown) >= cfg.max_selected_layers
        chosen = None if full else next_layer(top, self._grown, cfg.direction)
        if chosen is None:
            self._phase = "fixed"
            return self.event(step, "fixed")
        action: Action = "first_selection" if self._phase == "vanilla" else "select_new_layer"
        key = (cfg.seed, chosen, step)
        kept = choose_heads(self._ema[chosen], cfg.num_keep_heads, cfg.head_choice, key)
        self._grown[chosen] = Grown(1, kept, step)
        self._window_end = step + cfg.window_size
        self._phase = "selecting"
        return self.event(step, action, chosen, float(scores[chosen]))

    def _other_gate(self, grown: Grown) -> float:
        if len(grown.kept_heads) == self.num_heads:
            return 0.0  # no other head exists, so the plan must not change while nothing fades
        return window_gate(self.config.decay_type, self._step, grown.chosen_at, self.config.window_size)

    @property
    def max_loops(self) -> int:
        return self.config.max_loop_depth

    def final_plan(self, together: bool = False) -> LoopPlan:
        """As many layers as may be selected, the deepest ones, as deep as they may get."""
        grown = LayerPlan(self.config.max_loop_depth, self._placeholder_heads(together))
        return LoopPlan(self.num_layers, tuple((n, grown) for n in self._last_layers()))

    def worst_case(self, last_step: int, together: bool = False) -> Iterator[Stage]:
        """A layer is selected, or made deeper, whenever the rule may.

        Which layers a run selects, and whether it stops growing early, depends on entropies.
        """
        yield Stage(0, "vanilla", LoopPlan.empty(self.num_layers))
        cfg = self.config
        layers = self._last_layers()
        heads = self._placeholder_heads(together)
        fading = 0.0 if len(heads) == self.num_heads else 0.5
        step, grown = cfg.first_selection_step, {}
        for layer in reversed(layers) if cfg.direction == "deep_to_shallow" else layers:
            for depth in range(1, cfg.max_loop_depth + 1):
                if step >= last_step:
                    return
                grown[layer] = LayerPlan(depth, heads, fading if depth == 1 else 0.0)
                yield Stage(step, "window", LoopPlan(self.num_layers, tuple(grown.items())))
                grown[layer] = LayerPlan(depth, heads)
                step += cfg.window_size
        yield Stage(step, "fixed", LoopPlan(self.num_layers, tuple(grown.items())))

    def _last_layers(self) -> list[int]:
        """Of the layers that may be selected the deepest: in both directions all of them can be."""
        free = [n for n in range(self.num_layers) if n not in self.config.exclude_layers]
        return free[-self.config.max_selected_layers :]

    def _placeholder_heads(self, together: bool) -> tuple[int, ...]:
        """Heads that a layer may keep; apart, they share no keys and values, which costs more operations."""
        count = self.num_heads if self.config.head_choice == "all" else self.config.num_keep_heads
        stride = 1 if together else max(1, self.num_heads // count)
        return tuple(range(0, stride * count, stride))

    def advice(self, train_iters: int) -> Iterator[str]:
        cfg = self.config
        windows = cfg.max_selected_layers * cfg.max_loop_depth
        done = cfg.first_selection_step + windows * cfg.window_size
        if cfg.first_selection_step >= train_iters:
            yield (
                f"nothing grows: growth.first_selection_step {cfg.first_selection_step:,} is not before the end, "
                f"train.train_iters {train_iters:,}; lower it, or set growth.method=vanilla"
            )
        elif done > train_iters:
            fits = max(1, (train_iters - cfg.first_selection_step) // windows)
            yield (
                f"growth may still be running at the end: {windows} windows of {cfg.window_size:,} steps from step "
                f"{cfg.first_selection_step:,} on reach step {done:,}, train.train_iters is {train_iters:,}; "
                f"growth.window_size={fits} would fit"
            )

    def describe(self, added: str) -> str:
        cfg = self.config
        heads = "all heads" if cfg.head_choice == "all" else count(cfg.num_keep_heads, "head")
        return (
            f"up to {count(cfg.max_selected_layers, 'layer')} x {heads} x {count(cfg.max_loop_depth, 'loop')} "
            f"from step {cfg.first_selection_step} on, at most {added} once fixed"
        )

    @property
    def window_end(self) -> int | None:
        return self._window_end if self._phase == "selecting" else None

    @property
    def acted_until(self) -> int:
        return self._step

    def selected_at(self) -> dict[int, int]:
        return {n: grown.chosen_at for n, grown in self._grown.items() if grown.chosen_at > 0}

    def report(self) -> dict[str, Any]:
        return {"ema_entropy": self._ema.round(6).tolist()} if self.wanted else {}

    def report_event(self, event: GrowthEvent) -> dict[str, Any]:
        """What the decision was taken from, and where the layer stood in it."""
        excluded = set(self.config.exclude_layers)
        record: dict[str, Any] = {
            "max_selected_layers": self.config.max_selected_layers,
            "num_candidates": self.num_layers - len(excluded),
            "ema_entropy": self._ema.round(6).tolist(),
        }
        if event.layer is not None:
            scores = layer_scores(self._ema)
            above = [n for n, s in enumerate(scores) if n not in excluded and s > scores[event.layer]]
            record |= {
                "layer_rank": 1 + len(above),
                "fade_until_step": event.step + self.config.window_size,
            }
        return record

    def progress(self) -> dict[str, Any]:
        grown = [
            {"layer": n, "loops": g.loops, "kept_heads": list(g.kept_heads), "chosen_at": g.chosen_at}
            for n, g in self._grown.items()
        ]
        return {
            "phase": self._phase,
            "step": self._step,
            "window_end": self._window_end,
            "grown": grown,
            "ema": self._ema.tolist(),
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        ema = np.array(progress["ema"], dtype=np.float64)
        grown = dict(map(self._restored, progress["grown"]))
        phase, step, window_end = progress["phase"], progress["step"], progress["window_end"]
        if ema.shape != self._ema.shape or phase not in ("vanilla", "selecting", "fixed"):
            raise ValueError(f"EMA of shape {ema.shape}, phase {phase!r}")
        if not np.isfinite(ema).all():
            raise ValueError("an EMA entropy is not finite")
        if type(step) is not int or type(window_end) is not int:
            raise ValueError(f"step {step!r}, end of the window {window_end!r}")
        latest = max((chosen.chosen_at for chosen in grown.values()), default=0)
        if step < 0 or latest > step or not 0 <= window_end <= step + self.config.window_size:
            raise ValueError("a step lies where no run can have come to")
        if len(grown) < len(progress["grown"]) or (bool(grown) != (phase != "vanilla") and phase != "fixed"):
            raise ValueError(f"layers {[g['layer'] for g in progress['grown']]} in phase {phase!r}")
        self._ema, self._grown, self._phase = ema, grown, phase
        self._step, self._window_end = step, window_end

    def inherit(self, older: Schedule, grown: Inheritance) -> list[str]:
        """Selected layers become their heirs; entropies go with the layers and heads.

        Raises:
            ConfigError: a kept head would get another number, or a decision is due before the EMA has forgotten.
        """
        assert isinstance(older, SGTSchedule)
        if older._phase != "fixed" and not self._measures_all:
            decision = self.config.first_selection_step if older._phase == "vanilla" else older._window_end
            refuse_half_measured(older._step, decision, memory_steps(self.config.ema_decay))
        self._take_over(older, grown)
        if self._phase != "selecting":
            return []
        if self.config.direction == "deep_to_shallow":
            bound = min(self._grown)
            lost, why = grown.copies_between(bound + 1), f"deeper than {bound}, the shallowest that loops"
        else:
            bound = max(self._grown)
            lost, why = grown.copies_between(0, bound), f"shallower than {bound}, the deepest that loops"
        return [f"layers {lost} are {why}, so that none is ever selected"] if lost else []

    def _take_over(self, older: SGTSchedule, grown: Inheritance) -> None:
        refuse_moved((head for layer in older._grown.values() for head in layer.kept_heads), grown)
        self._ema = grown.entropies(older._ema)
        self._phase, self._step, self._window_end = older._phase, older._step, older._window_end
        self._grown = {grown.heirs[n]: replace(layer) for n, layer in older._grown.items()}

    def check_growth(self, step: int, grown: Inheritance) -> None:
        """See Schedule: any head may be kept from the first selection on, and any decision be the last one.

        Raises:
            ConfigError: as ``inherit``.
        """
        cfg = self.config
        if step >= cfg.first_selection_step and (moved := grown.moved(range(self.num_heads))):
            raise ConfigError(
                f"heads {moved} would get other numbers, but looping layers keep heads from "
                f"growth.first_selection_step {cfg.first_selection_step} on; let num_query_groups grow in proportion "
                "to num_attention_heads, or the model grow before"
            )
        decisions = range(
            cfg.first_selection_step,
            cfg.first_selection_step + cfg.max_selected_layers * cfg.max_loop_depth * cfg.window_size + 1,
            cfg.window_size,
        )
        decision = next((one for one in decisions if one > step), None)
        if decision is not None and not self._measures_all:
            refuse_half_measured(step, decision, memory_steps(cfg.ema_decay))

    def _restored(self, entry: Mapping[str, Any]) -> tuple[int, Grown]:
        """A layer of ``progress``; a ValueError for one that this model cannot have grown."""
        layer, loops, chosen_at, kept = entry["layer"], entry["loops"], entry["chosen_at"], tuple(entry["kept_heads"])
        if not all(type(number) is int for number in (layer, loops, chosen_at, *kept)):
            raise ValueError(f"layer {layer!r}, loops {loops!r}, kept heads {kept!r}")
        LayerPlan(loops, kept)  # refuses what no layer can execute
        possible = 0 <= layer < self.num_layers and 1 <= loops <= self.max_loops and kept[-1] < self.num_heads
        if not possible or chosen_at < -self.config.window_size:
            raise ValueError(f"layer {layer} with {loops} loops of heads {list(kept)}")
        return layer, Grown(loops, kept, chosen_at)

    @classmethod
    def settings_for(cls, plan: LoopPlan, num_heads: int) -> dict[str, Any] | None:
        """See Schedule; for the empty plan, settings under which growth is still to come."""
        layers = dict(plan.layers)
        free = plan.num_layers - 1  # layer 0 is not selected, as a rule
        if not layers:
            few = {"top_k_layers": min(3, free), "num_keep_heads": min(2, num_heads)}
            return {"method": cls.name, **few} if free else None
        if any(layer.block_loops for layer in layers.values()):
            return None
        return {
            "method": cls.name,
            "top_k_layers": min(3, free) or 1,
            "max_selected_layers": len(layers),
            "max_loop_depth": max(layer.loops for layer in layers.values()),
            "num_keep_heads": max(len(layer.kept_heads) for layer in layers.values()),
            "exclude_layers": [] if 0 in layers else [0],
        }

    def adopt(self, plan: LoopPlan) -> None:
        """The layers are taken as selected so long ago that their windows are over."""
        refuse_unlike(plan, self.config, self.num_heads)
        self._phase = "fixed"
        self._grown = {n: Grown(layer.loops, layer.kept_heads, -self.config.window_size) for n, layer in plan.layers}
