"""Learning rates by the table, worked out by hand for lr 1.0."""

from typing import Any

import pytest

from megatron_sgt import extensions
from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.optim.schedule import CURVES, learning_rate
from tests.helpers.choices import built_in

HALF_COSINE_QUARTER = (1 + 0.5**0.5) / 2  # (1 + cos(π / 4)) / 2


def rate(step: int, train_iters: int = 100, **changes: Any) -> float:
    return learning_rate(step, OptimConfig.model_validate({"lr": 1.0, **changes}), train_iters)


@pytest.mark.parametrize(
    ("changes", "table"),
    [
        # Step 1 already moves; the peak is reached at the last warm-up step.
        ({"lr_warmup_iters": 4}, {1: 0.25, 2: 0.5, 3: 0.75, 4: 1.0}),
        ({"lr_decay_style": "constant", "lr_warmup_iters": 2}, {1: 0.5, 2: 1.0, 3: 1.0, 100: 1.0, 500: 1.0}),
        ({"lr_decay_style": "constant"}, {1: 1.0}),
        ({"lr_decay_style": "linear"}, {1: 0.99, 25: 0.75, 50: 0.5, 99: 0.01, 100: 0.0, 101: 0.0}),
        (
            {"lr_decay_style": "linear", "min_lr": 0.2, "lr_warmup_iters": 20},
            {20: 1.0, 40: 0.8, 60: 0.6, 80: 0.4, 100: 0.2, 1000: 0.2},
        ),
        ({}, {25: HALF_COSINE_QUARTER, 50: 0.5, 75: 1 - HALF_COSINE_QUARTER, 100: 0.0, 150: 0.0}),
        (
            {"min_lr": 0.5, "lr_warmup_iters": 60},
            {30: 0.5, 60: 1.0, 70: 0.5 + HALF_COSINE_QUARTER / 2, 80: 0.75, 100: 0.5},
        ),
        ({"lr_decay_iters": 40}, {20: 0.5, 40: 0.0, 41: 0.0, 100: 0.0}),
        ({"lr_decay_iters": 200}, {50: HALF_COSINE_QUARTER, 100: 0.5, 200: 0.0}),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 20, "lr_warmup_iters": 10, "min_lr": 0.1},
            {5: 0.5, 10: 1.0, 50: 1.0, 80: 1.0, 85: 0.775, 90: 0.55, 100: 0.1, 200: 0.1},
        ),
        (
            {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 10, "lr_decay_iters": 50},
            {1: 1.0, 40: 1.0, 45: 0.5, 50: 0.0, 60: 0.0},
        ),
    ],
)
def test_table(changes: dict[str, Any], table: dict[int, float]) -> None:
    assert {step: rate(step, **changes) for step in table} == pytest.approx(table, abs=1e-12)


@pytest.mark.parametrize("style", ["cosine", "linear", "WSD"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rises_once_then_never_again_and_stays_in_its_range(style: str, warmup: int) -> None:
    changes: dict[str, Any] = {"lr_decay_style": style, "lr_warmup_iters": warmup, "min_lr": 0.05}
    if style == "WSD":
        changes["lr_wsd_decay_iters"] = 30
    rates = [rate(step, train_iters=60, **changes) for step in range(1, 90)]
    rising, falling = rates[:warmup], rates[max(0, warmup - 1) :]
    assert rising == sorted(rising) and falling == sorted(falling, reverse=True)
    assert min(rates) > 0.0 and max(rates) <= 1.0
    assert rates[59:] == pytest.approx([0.05] * 30)


@pytest.mark.parametrize("style", ["cosine", "linear"])
def test_warmup_may_fill_the_whole_run(style: str) -> None:
    rates = [rate(step, train_iters=5, lr_decay_style=style, lr_warmup_iters=5) for step in (1, 5, 6)]
    assert rates == pytest.approx([0.2, 1.0, 0.0])


def test_a_registered_curve_follows_the_warm_up() -> None:
    def one_over_sqrt(step: int, config: OptimConfig, end: int) -> float:
        return config.lr * (config.lr_warmup_iters / step) ** 0.5 if step < end else config.min_lr

    extensions.register("lr_schedules", "one_over_sqrt", one_over_sqrt)
    try:
        rates = [rate(step, lr_decay_style="one_over_sqrt", lr_warmup_iters=4, min_lr=0.1) for step in (2, 4, 16, 100)]
    finally:
        extensions.unregister("lr_schedules", "one_over_sqrt")
    assert rates == [0.5, 1.0, 0.5, 0.1]


def test_the_table_has_what_the_configuration_knows() -> None:
    assert built_in(OptimConfig, "lr_decay_style") == tuple(CURVES)
