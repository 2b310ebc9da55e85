"""The search for the next depth: which layers a candidate executes, what each step trains, which candidate wins."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import yaml

from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.operators import OPERATORS
from megatron_sgt.stages.search import (
    check_length,
    executed_layers,
    judge,
    measured_after,
    sampled,
    stage_entry,
    supernet,
)
from megatron_sgt.stages.stages import stages_of
from tests.helpers.growing import shape
from tests.helpers.single import small_config


def model(layers: int) -> ModelConfig:
    return shape(num_layers=layers)


@pytest.mark.parametrize(
    ("old", "deepest", "map_of"),
    [
        (6, 12, {6: [0, 1, 2, 3, 4, 5], 9: [0, 1, 2, 3, 3, 4, 4, 5, 5], 12: [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]}),
        (12, 18, {12: [*range(12)], 18: [*range(6), *(n for n in range(6, 12) for _ in range(2))]}),
        (2, 4, {3: [0, 1, 1], 4: [0, 0, 1, 1]}),
        (5, 7, {6: [0, 1, 2, 3, 4, 4], 7: [0, 1, 2, 3, 3, 4, 4]}),
    ],
)
def test_a_sub_net_holds_the_layers_of_its_own_growth(old: int, deepest: int, map_of: dict[int, list[int]]) -> None:
    growth = supernet(model(old), sorted({old, *map_of, deepest - 1})[-3:])
    assert growth.new.num_layers == deepest
    for depth, layers in map_of.items():
        executed = executed_layers(growth, depth)
        assert [growth.layers[n] for n in executed] == layers and list(executed) == sorted(set(executed))
        if depth > old:
            assert list(OPERATORS["auto_prog"](model(old), {"num_layers": depth}).layers) == layers
        assert set(growth.heirs) <= set(executed)  # a layer that loops is in every sub-net


@pytest.mark.parametrize(
    ("depths", "message"),
    [
        ((6, 9), "depths 6,9: must be three different numbers of layers, the lowest first"),
        ((6, 7, 8, 9), "depths 6,7,8,9: must be three"),
        ((9, 6, 7), "depths 9,6,7: must be three"),
        ((6, 6, 7), "depths 6,6,7: must be three"),
        ((5, 7, 9), "depths 5,7,9: a model of 6 layers has candidates of 6 to 12 layers"),
        ((6, 9, 13), "depths 6,9,13: a model of 6 layers"),
    ],
)
def test_other_depths_are_refused(depths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        supernet(model(6), depths)


def test_steps_are_a_function_of_the_seed_and_fair() -> None:
    drawn = sampled((6, 9, 12), 3000, seed=1)
    assert drawn == sampled((6, 9, 12), 3000, seed=1) != sampled((6, 9, 12), 3000, seed=2)
    assert all(900 < count < 1100 for count in Counter(drawn).values())


@pytest.mark.parametrize(
    ("steps", "after"), [(16, (10, 12, 14, 16)), (200, (125, 150, 175, 200)), (3, (2, 3)), (1, (1,))]
)
def test_candidates_are_measured_in_the_second_half(steps: int, after: tuple[int, ...]) -> None:
    assert measured_after(steps) == after


@pytest.mark.parametrize(
    ("losses", "times", "exponent", "scores", "best"),
    [
        ((3.0, 2.8, 2.75), (1.0, 1.5, 2.0), 0.12989233, (3.0, 2.95141945, 3.00908310), 9),
        ((3.0, 2.95, 2.75), (1.0, 1.5, 2.0), 0.11737165, (3.0, 3.09378505, 2.98308123), 12),
        ((3.0, 2.95, 2.75), (1.0, 1.2, 2.0), 0.12775379, (3.0, 3.01951868, 3.00462597), 6),
    ],
)
def test_the_argmin_on_a_hand_made_table(
    losses: tuple[float, ...], times: tuple[float, ...], exponent: float, scores: tuple[float, ...], best: int
) -> None:
    """Exponents and scores as scipy.optimize.curve_fit finds them, which the source uses; the unit of time is free."""
    depths = (6, 9, 12)
    for unit in (1.0, 1000.0):
        seconds = {depth: unit * time for depth, time in zip(depths, times, strict=True)}
        found = judge(dict(zip(depths, losses, strict=True)), seconds)
        assert found.best == best and found.exponent == pytest.approx(exponent, abs=1e-7)
        assert list(found.scores.values()) == pytest.approx([score * unit**exponent for score in scores], rel=1e-6)


def test_on_the_curve_all_candidates_are_equal() -> None:
    found = judge({6: 4.0, 9: 2.0, 12: 1.0}, {6: 1.0, 9: 4.0, 12: 16.0})
    assert found.exponent == pytest.approx(0.5) and list(found.scores.values()) == pytest.approx([4.0] * 3)


def test_more_time_that_brings_nothing_costs_nothing() -> None:
    verdict = judge({6: 2.0, 9: 2.2, 12: 2.4}, {6: 1.0, 9: 1.5, 12: 2.0})
    assert verdict.exponent == 0.0 and verdict.best == 6 and verdict.scores == {6: 2.0, 9: 2.2, 12: 2.4}
    equal = judge({6: 2.0, 9: 1.9, 12: 1.95}, {6: 1.0, 9: 1.0, 12: 1.0})
    assert equal.best == 9


@pytest.mark.parametrize(
    ("optim", "steps", "message"),
    [
        ({}, 5, None),
        (
            {},
            6,
            r"train\.train_iters 10: ends before step 11, the last of 6 after the checkpoint's 5; set the length",
        ),
        (
            {"lr_decay_iters": 8},
            4,
            r"optim\.lr_decay_iters 8: the decay ends before step 9, the last of 4 after the check",
        ),
        ({"lr_decay_iters": 8, "lr_decay_style": "constant"}, 4, None),
    ],
)
def test_a_search_stays_inside_the_run(optim: dict[str, Any], steps: int, message: str | None) -> None:
    config = small_config(optim=optim)
    with nullcontext() if message is None else pytest.raises(ConfigError, match=message):
        check_length(config, 5, steps)


def test_the_entry_can_be_pasted() -> None:
    entry = yaml.safe_load(stage_entry(6, 3, "weights"))
    config = small_config(growth={**entry["growth"], "exclude_layers": [0]})
    assert [(s.last, s.config.model.num_layers) for s in stages_of(config)] == [(3, 4), (10, 6)]
