"""AutoProg's search for the next depth: its sub-nets, and the score that chooses one. No torch.

Source: arXiv 2203.14509, section 4.2, and its code (changlin31/AutoProg).

The deepest candidate, grown by ``auto_prog``, is the supernet. The sub-net of a candidate of d layers is what
``auto_prog`` makes of the old model with d layers: the supernet without those second copies of layers that d layers
have once. In each step one random sub-net is trained. Then, over the candidates' mean losses L and times per step t,

    fit L = a2 · t^a1 by least squares,   w = max(-a1, 0),   score = L · t^w,   the lowest wins

so that what decides is how far a candidate lies below the curve that says what more time usually brings. Two points
always lie on such a curve: it takes three candidates.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.growth import Growth
from megatron_sgt.stages.operators.auto_prog import OPERATOR

_DEPTHS = 3
_MEASUREMENTS = 4
_GAUSS_NEWTON = 50


def supernet(model: ModelConfig, depths: Sequence[int]) -> Growth:
    """From ``model`` to the deepest of ``depths``; each of them can be asked for by ``executed_layers``.

    Raises:
        ConfigError: ``depths`` are not three ascending ones, from the model's own to twice it.
    """
    old, shown = model.num_layers, ",".join(map(str, depths))
    if len(depths) != _DEPTHS or sorted(set(depths)) != list(depths):
        raise ConfigError(f"depths {shown}: must be three different numbers of layers, the lowest first")
    if depths[0] < old or depths[-1] > 2 * old:
        raise ConfigError(f"depths {shown}: a model of {old} layers has candidates of {old} to {2 * old} layers")
    return OPERATOR(model, {"num_layers": depths[-1]})


def executed_layers(growth: Growth, depth: int) -> tuple[int, ...]:
    """The layers of the supernet ``growth`` that its sub-net of ``depth`` layers executes, ascending."""
    old = growth.old.num_layers
    once = 2 * old - depth  # auto_prog: the layers from here on stand twice
    return tuple(n for n, source in enumerate(growth.layers) if n == growth.heirs[source] or source >= once)


def check_length(config: Config, step: int, steps: int) -> None:
    """Refuse a search of ``steps`` steps from a checkpoint after ``step`` that the run's learning rate is not made for.

    Raises:
        ConfigError: the run, or its decay, ends before.
    """
    last = step + steps
    if last > config.train.train_iters:
        raise ConfigError(
            f"train.train_iters {config.train.train_iters:,}: ends before step {last:,}, the last of {steps:,} after "
            f"the checkpoint's {step:,}; set the length of the whole run, which the learning rate follows"
        )
    if config.optim.lr_decay_style != "constant" and last > config.lr_decay_iters:
        raise ConfigError(
            f"optim.lr_decay_iters {config.lr_decay_iters:,}: the decay ends before step {last:,}, the last of "
            f"{steps:,} after the checkpoint's {step:,}; set that of the whole run, or remove it"
        )


def sampled(depths: Sequence[int], steps: int, seed: int) -> list[int]:
    """The depth that each step trains: a function of ``seed``, and so the same on every rank."""
    generator = random.Random(f"stage search {seed}")
    return generator.choices(depths, k=steps)


def measured_after(steps: int) -> tuple[int, ...]:
    """After which of ``steps`` steps the candidates are measured: four times in the second half (of two epochs)."""
    second_half = steps - steps // 2
    return tuple(sorted({steps - second_half * n // _MEASUREMENTS for n in range(_MEASUREMENTS)}))


@dataclass(frozen=True)
class Verdict:
    """``exponent``: the w of the score; ``scores``: by depth; ``best``: the depth of the lowest."""

    exponent: float
    scores: dict[int, float]
    best: int


def judge(losses: Mapping[int, float], seconds: Mapping[int, float]) -> Verdict:
    """The source's choice among depths.

    Args:
        losses: mean loss of each candidate, in nats per token.
        seconds: time of a step of each.
    """
    depths = sorted(losses)
    times, values = (np.array([of[depth] for depth in depths], np.float64) for of in (seconds, losses))
    exponent = max(-_fitted_exponent(times, values), 0.0)
    scores = {depth: losses[depth] * seconds[depth] ** exponent for depth in depths}
    return Verdict(exponent, scores, min(depths, key=lambda depth: (scores[depth], depth)))


def _fitted_exponent(times: np.ndarray, losses: np.ndarray) -> float:
    """a1 of the least-squares fit of ``losses`` = a2 · ``times``^a1: Gauss-Newton from the fit of the logarithms."""
    if np.ptp(times) == 0:
        return 0.0
    logs = np.log(times / times.mean())  # the unit of time changes a2 alone
    found = np.polyfit(logs, np.log(losses), 1)  # a1, log a2
    for _ in range(_GAUSS_NEWTON):
        curve = np.exp(found[1] + found[0] * logs)
        found = found + np.linalg.lstsq(np.stack([curve * logs, curve], axis=1), losses - curve, rcond=None)[0]
    return float(found[0])


def stage_entry(depth: int, step: int, weights: str) -> str:
    """The entry of ``growth.stages`` that grows to ``depth`` layers after ``step``, as YAML."""
    grow = f"operator: {OPERATOR.name}, options: {{num_layers: {depth}}}, weights: {weights}"
    return f"growth:\n  stages:\n    - {{until_steps: {step}, {grow}}}"
