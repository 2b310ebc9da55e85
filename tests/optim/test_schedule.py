"""Learning rates by the table, worked out by hand for lr 1.0."""

from typing import Any

import pytest

from megatron_sgt import extensions
from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.optim.schedule import CURVES, check_curve, learning_rate, rate_of_run
from megatron_sgt.stages.stages import Stage, stages_of
from tests.helpers.choices import built_in
from tests.helpers.single import small_config

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


def stages(*policies: str, **optim: Any) -> tuple[Stage, ...]:
    """Stages that end after 4, 10 and 14 of 20 steps, by default of a linear decay."""
    ends = [
        {"until_steps": end, "operator": "grad_stack", "options": {"block_size": 1}, "lr_policy": policy}
        for end, policy in zip((4, 10, 14), policies, strict=False)
    ]
    optim = {"lr": 1.0, "lr_decay_style": "linear", "lr_warmup_iters": 0} | optim
    growth = {"method": "vanilla", "stages": ends}
    return stages_of(small_config(growth=growth, optim=optim, train={"train_iters": 20}))


def staged(*policies: str, **optim: Any) -> list[float]:
    """Rates of all 20 steps."""
    found = stages(*policies, **optim)
    return [rate_of_run(step, found) for step in range(1, 21)]


PLAIN = [1 - step / 20 for step in range(1, 21)]


def test_the_decay_ends_with_the_run_and_not_with_a_stage() -> None:
    assert staged() == staged("continue", "continue") == PLAIN


def test_a_stage_warms_up_again() -> None:
    rates = staged("rewarm(4)")
    assert rates[:4] == PLAIN[:4] and rates[7:] == PLAIN[7:]
    assert rates[4:8] == [PLAIN[4 + k] * (k + 1) / 4 for k in range(4)]
    # Longer than its stage: the next one goes on with it, unless it has a policy of its own.
    longer = [PLAIN[4 + k] * (k + 1) / 12 for k in range(12)]
    assert staged("rewarm(12)", "continue")[4:16] == pytest.approx(longer)
    assert staged("rewarm(12)", "rewarm(1)")[10:] == PLAIN[10:]


def test_a_stage_goes_back_on_the_curve_and_the_rest_is_stretched() -> None:
    rates = staged("rewind(2)", "continue", "rewarm(2)")
    stretched = [1 - (2 + k * 18 / 16) / 20 for k in range(1, 17)]
    assert rates[:4] == PLAIN[:4] and rates[4:14] == pytest.approx(stretched[:10])
    assert rates[14:] == pytest.approx([stretched[10] / 2, *stretched[11:]])
    assert rates[-1] == pytest.approx(0.0)
    again = staged("rewind(2)", "rewind(1)")
    assert again[10:] == pytest.approx([1 - (1 + k * 19 / 10) / 20 for k in range(1, 11)])


def test_the_final_decay_of_wsd_keeps_its_length() -> None:
    wsd = {"lr": 1.0, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 4, "lr_warmup_iters": 4}
    decay = [0.75, 0.5, 0.25, 0.0]
    assert staged("rewind(2)", **wsd)[12:] == [1.0] * 4 + decay
    assert staged("rewind(2)", **wsd)[4:7] == pytest.approx([(2 + k * 14 / 12) / 4 for k in (1,)] + [1.0] * 2)
    begun = staged("continue", "continue", "rewind(10)", **{**wsd, "lr_wsd_decay_iters": 8})
    assert begun[14:] == pytest.approx([1.0 - max(0.0, 10 + k * 10 / 6 - 12) / 8 for k in range(1, 7)])


def test_a_curve_that_knows_whole_steps_alone_is_refused_before_the_run() -> None:
    table = [1 - step / 20 for step in range(21)]
    extensions.register("lr_schedules", "table", lambda step, config, end: table[step])
    try:
        check_curve(stages("rewarm(4)", lr_decay_style="table"))
        with pytest.raises(
            ConfigError, match=r"lr_decay_style: table has no learning rate for step 5, TypeError: .*as fl"
        ):
            check_curve(stages("rewind(2)", lr_decay_style="table"))
    finally:
        extensions.unregister("lr_schedules", "table")


def rates(*phases: dict[str, Any], **optim: Any) -> list[float]:
    """Of 12 steps."""
    config = small_config(phases, optim={"lr": 1.0, "lr_decay_style": "constant", **optim}, train={"train_iters": 12})
    stages = stages_of(config)
    check_curve(stages)
    return [rate_of_run(step, stages) for step in range(1, 13)]


def test_without_rates_of_their_own_phases_leave_the_curve_of_the_run() -> None:
    plain = rates(lr_decay_style="cosine", lr_warmup_iters=3)
    assert rates({"until_steps": 5}, {"rotary_base": 5e5}, lr_decay_style="cosine", lr_warmup_iters=3) == plain


def test_a_phase_decays_from_where_the_one_before_has_ended() -> None:
    found = rates({"until_steps": 8}, {"lr_decay_style": "linear", "min_lr": 0.2}, lr_warmup_iters=2)
    assert found == pytest.approx([0.5, *[1.0] * 7, 0.8, 0.6, 0.4, 0.2])


def test_a_phase_without_a_rate_stays_where_the_one_before_has_ended() -> None:
    first = {"until_steps": 4, "lr_decay_style": "linear", "lr_warmup_iters": 2, "min_lr": 0.4}
    found = rates(first, {"until_steps": 6}, {"lr": 0.8, "lr_warmup_iters": 2, "lr_decay_style": "constant"})
    assert found == pytest.approx([0.5, 1.0, 0.7, 0.4, 0.4, 0.4, 0.6, *[0.8] * 5])


def test_the_first_phase_takes_what_it_does_not_set_from_the_section() -> None:
    found = rates({"until_steps": 4, "lr_decay_style": "linear"}, {}, lr_warmup_iters=2, min_lr=0.5)
    assert found == pytest.approx([0.5, 1.0, 0.75, *[0.5] * 9])


def test_wsd_and_cosine_run_over_the_steps_of_their_phase() -> None:
    wsd = {"until_steps": 6, "lr_decay_style": "WSD", "lr_wsd_decay_iters": 4}
    found = rates(wsd, {"lr": 1.0, "lr_decay_style": "cosine"})
    assert found[:6] == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25, 0.0])
    assert found[6:] == pytest.approx([rate(step, 6) for step in range(1, 7)])


def test_a_phase_whose_curve_would_rise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"phases\[1\]: min_lr 0.5 is above lr 0.2, with which its curve begins"):
        rates({"until_steps": 6, "min_lr": 0.2, "lr_decay_style": "linear"}, {"lr_decay_style": "linear"}, min_lr=0.5)
