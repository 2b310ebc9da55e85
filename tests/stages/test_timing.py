"""When models grow: the numbers of the sources."""

from __future__ import annotations

from itertools import pairwise

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.stages.timing import fitted_parameters, g_stack_time, half_boundaries, prop_boundaries
from tests.helpers.growing import shape


def test_prop_2_of_six_stages() -> None:
    assert prop_boundaries(10_000, 6, 2) == pytest.approx((109, 548, 1537, 3295, 6042), abs=1)


@pytest.mark.parametrize(
    ("stages", "alpha", "speed_up"),
    [(6, 0, 1.714), (6, 1, 1.385), (6, 1.5, 1.298), (6, 2, 1.238), (6, 3, 1.163), (4, 1, 1.333), (4, 2, 1.200)],
)
def test_work_that_prop_alpha_saves(stages: int, alpha: float, speed_up: float) -> None:
    """Stage i has i of k blocks."""
    steps = 1_000_000
    ends = [0, *prop_boundaries(steps, stages, alpha), steps]
    work = sum(i * (ends[i] - ends[i - 1]) for i in range(1, stages + 1))
    assert stages * steps / work == pytest.approx(speed_up, abs=5e-4)


@pytest.mark.parametrize("steps", range(5, 40))
def test_every_stage_has_a_step(steps: int) -> None:
    ends = [0, *prop_boundaries(steps, 5, 3), steps]
    assert all(earlier < later for earlier, later in pairwise(ends))


def test_fewer_steps_than_stages() -> None:
    with pytest.raises(ConfigError, match="train_iters 3 has no step for each of 4 stages"):
        prop_boundaries(3, 4, 2)


@pytest.mark.parametrize(
    ("parameters", "tokens", "fitted"),
    [(8e9, 15e12, 6.58e9), (7e9, 2e12, 11.11e9), (13e9, 2e12, 15.84e9), (70e9, 2e12, 42.48e9)],
)
def test_growth_times_that_the_source_lists(parameters: float, tokens: float, fitted: float) -> None:
    time = g_stack_time(parameters, tokens)
    assert time.fitted == time.tokens == pytest.approx(fitted, rel=5e-4)
    assert not time.clamped and not time.in_range  # its runs are smaller


@pytest.mark.parametrize(("parameters", "fitted"), [(300e6, 11.7e9), (410e6, 13.5e9)])
def test_short_runs_of_small_models_are_outside_and_clamped(parameters: float, fitted: float) -> None:
    time = g_stack_time(parameters, 20e9)
    assert (time.tokens, time.clamped, time.in_range) == (2e9, True, False)
    assert time.fitted == pytest.approx(fitted, rel=1e-2)


def test_the_sources_own_runs_are_inside() -> None:
    assert g_stack_time(7e9, 300e9).in_range and g_stack_time(1.1e9, 100e9).in_range
    assert g_stack_time(1e6, 10).tokens == 1  # no overflow


def test_the_fit_counts_parameters_before_a_tokenizer_is_known() -> None:
    model = shape(vocab_size=None)
    assert fitted_parameters(model) == fitted_parameters(shape(vocab_size=777))
    assert fitted_parameters(model) == parameter_count(shape(vocab_size=32_000))


def test_growths_at_equal_distances_in_the_first_half() -> None:
    assert half_boundaries(100, 5) == (10, 20, 30, 40, 50)
    assert half_boundaries(8, 5) == (1, 2, 3, 4, 5) == half_boundaries(6, 5)
    with pytest.raises(ConfigError, match=r"train\.train_iters 5 has no step for each of 6 stages; train for longer"):
        half_boundaries(5, 5)
