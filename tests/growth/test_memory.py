"""growth.exact_ema: false measures less and decides the same."""

import numpy as np
import pytest

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.growth.sgt import SGTSchedule, memory_steps

LAYERS, HEADS, STEPS = 6, 4, 400


@pytest.mark.parametrize(("decay", "steps"), [(0.0, 1), (0.5, 24), (0.9, 158), (0.1, 8)])
def test_steps_until_fp32_has_forgotten(decay: float, steps: int) -> None:
    assert memory_steps(decay) == steps
    assert decay**steps <= 2.0**-24
    assert steps == 1 or decay ** (steps - 1) > 2.0**-24


def run(exact: bool, seed: int, decay: float) -> tuple[list[object], int, np.ndarray]:
    """(events, measured steps, EMA at the last decision) of a run on random entropies."""
    config = GrowthConfig(exact_ema=exact, ema_decay=decay, first_selection_step=60, window_size=70, max_loop_depth=2)
    schedule = SGTSchedule(config, LAYERS, HEADS)
    generator = np.random.default_rng(seed)
    events: list[object] = []
    measured, ema = 0, schedule.ema
    for step in range(1, STEPS + 1):
        table = generator.random((LAYERS, 3, HEADS))
        if schedule.wanted:
            schedule.observe("entropy", table)
            measured += 1
        happened = schedule.after_step(step)
        if happened:
            ema = schedule.ema
        events += [event.to_dict() | {"layer_score": None} for event in happened]
    return events, measured, ema


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("seed", range(20))
def test_the_same_decisions_from_fewer_measurements(seed: int, decay: float) -> None:
    events, always, ema = run(True, seed, decay)
    sparse_events, sometimes, sparse_ema = run(False, seed, decay)
    assert sparse_events == events and len(events) > 3
    assert sometimes <= (len(events) + 1) * memory_steps(decay) < always
    assert np.abs(sparse_ema - ema).max() <= 2.0**-23


def test_measuring_starts_in_time_and_stops_with_the_structure() -> None:
    config = GrowthConfig(exact_ema=False, first_selection_step=60, window_size=70, max_selected_layers=1)
    schedule = SGTSchedule(config, LAYERS, HEADS)
    wanted = [step for step in range(1, 200) if 37 <= step <= 60 or 107 <= step <= 130]
    measured = []
    for step in range(1, 200):
        if schedule.wanted:
            measured.append(step)
            schedule.observe("entropy", np.full((LAYERS, 2, HEADS), 0.5))
        schedule.after_step(step)
    assert measured == wanted
    assert schedule.phase == "fixed"
