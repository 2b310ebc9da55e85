"""When to grow: the stage lengths of Prop-alpha, and G_stack's fitted growth time. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import log10

from megatron_sgt.arch.weights import weights
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError

MOST_SHARE = 0.1
"""Of a run's tokens: no more are taken for the small model of G_stack, whatever the fit says."""
FITTED_PARAMETERS = (4.1e8, 7e9)
FITTED_FLOPS = (6.6e20, 1.26e22)
"""From the smallest to the largest of the runs that G_stack's source reports: 410M, 1.1B on 100B tokens; 7B on 300B."""
FITTED_VOCABULARY = 32_000
"""Of the models whose parameters the fit counts, so that it says the same before and after a tokenizer is known."""


def prop_boundaries(steps: int, stages: int, alpha: float) -> tuple[int, ...]:
    """Steps after which a model grows under Prop-alpha (arXiv 2409.19044): stage i of k takes i^alpha / sum j^alpha.

    Each length is rounded down, to at least one step; the last stage takes the rest.

    Raises:
        ConfigError: there are fewer steps than stages.
    """
    _check_room(steps, stages)
    shares = [i**alpha for i in range(1, stages + 1)]
    ends, end = [], 0
    for number, share in enumerate(shares[:-1], start=1):
        # A step is left for each stage that follows.
        end = min(end + max(1, int(steps * share / sum(shares))), steps - stages + number)
        ends.append(end)
    return tuple(ends)


def half_boundaries(steps: int, growths: int) -> tuple[int, ...]:
    """Steps after which a model grows ``growths`` times at equal distances in the first half of a run.

    In a run that is too short for that, later: each stage has at least one step.

    Raises:
        ConfigError: there are fewer steps than stages.
    """
    _check_room(steps, growths + 1)
    return tuple(max(number, steps * number // (2 * growths)) for number in range(1, growths + 1))


def _check_room(steps: int, stages: int) -> None:
    if steps < stages:
        raise ConfigError(f"train.train_iters {steps:,} has no step for each of {stages} stages; train for longer")


@dataclass(frozen=True)
class GrowthTime:
    """After how many tokens a model is stacked.

    Attributes:
        tokens: at most MOST_SHARE of the run's.
        fitted: what the fit says.
        in_range: whether the model and the run are between those that it was made of.
    """

    tokens: float
    fitted: float
    in_range: bool

    @property
    def clamped(self) -> bool:
        return self.tokens < self.fitted


def fitted_parameters(model: ModelConfig) -> int:
    """N of the final model ``model``, as ``g_stack_time`` takes it."""
    return sum(weight.elements for weight in weights(model.model_copy(update={"vocab_size": FITTED_VOCABULARY})))


def g_stack_time(parameters: float, tokens: float) -> GrowthTime:
    """G_stack's growth time (arXiv 2405.15319): log10 d = 0.88 log10 N + 163.27 / log10 C - 5.74, C = 6 N D.

    Args:
        parameters: N, of the final model: ``fitted_parameters``.
        tokens: D, of the whole run.
    """
    flops = 6 * parameters * tokens
    # Of tiny runs log10 C is small, and the power beyond any number.
    exponent = min(300.0, 0.88 * log10(parameters) + 163.27 / max(log10(flops), 0.01) - 5.74)
    fitted = 10**exponent
    return GrowthTime(
        tokens=min(fitted, MOST_SHARE * tokens),
        fitted=fitted,
        in_range=_within(parameters, FITTED_PARAMETERS) and _within(flops, FITTED_FLOPS),
    )


def _within(value: float, bounds: tuple[float, float]) -> bool:
    low, high = bounds
    return low <= value <= high
