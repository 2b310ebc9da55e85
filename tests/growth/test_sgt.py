"""The schedule by hand-made tables: each rule of the method once, and exact resumption."""

import json
from typing import Any

import numpy as np
import pytest

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.growth import GrowthEvent, LayerPlan, LoopPlan, SGTSchedule

SMALL: dict[str, Any] = {
    "first_selection_step": 3,
    "window_size": 4,
    "top_k_layers": 2,
    "max_selected_layers": 2,
    "num_keep_heads": 1,
    "ema_decay": 0.0,
}


def make(num_layers: int = 5, num_heads: int = 2, **changes: Any) -> SGTSchedule:
    return SGTSchedule(GrowthConfig(**{**SMALL, **changes}), num_layers, num_heads)


def table(scores: list[float], passes: int = 2, heads: int = 2) -> np.ndarray:
    """Entropies [L, P, H] with these layer scores; a lower head always has the higher entropy."""
    tilt = np.linspace(0.05, -0.05, heads)
    return np.broadcast_to(np.array(scores)[:, None, None] + tilt, (len(scores), passes, heads)).copy()


def drive(schedule: SGTSchedule, steps: range, scores: list[float]) -> list[GrowthEvent]:
    passes = 1 + schedule.config.max_loop_depth
    events = []
    for step in steps:
        schedule.observe("entropy", table(scores, passes, schedule.num_heads))
        decides = schedule.decides_at(step)
        found = schedule.after_step(step)
        assert decides == bool(found)
        events += found
    return events


def brief(events: list[GrowthEvent]) -> list[tuple[int, str, int | None]]:
    return [(event.step, event.action, event.layer) for event in events]


def test_growth_from_deep_to_shallow_with_gates_of_every_step() -> None:
    schedule = make()
    scores = [0.9, 0.2, 0.5, 0.6, 0.1]
    assert schedule.phase == "vanilla"
    assert drive(schedule, range(1, 3), scores) == []
    assert schedule.plan == LoopPlan.empty(5)
    gates = {}
    events = []
    for step in range(3, 14):
        events += drive(schedule, range(step, step + 1), scores)
        gates[step] = (schedule.plan[3].other_gate, schedule.plan[2].other_gate)
    assert brief(events) == [(3, "first_selection", 3), (7, "select_new_layer", 2), (11, "fixed", None)]
    assert [event.phase for event in events] == ["selecting", "selecting", "fixed"]
    assert [event.layer_score for event in events] == [pytest.approx(0.6), pytest.approx(0.5), None]
    assert events[1].kept_heads == {2: (0,), 3: (0,)}
    assert [event.loops for event in events] == [(0, 0, 0, 1, 0), (0, 0, 1, 1, 0), (0, 0, 1, 1, 0)]
    assert gates == {
        3: (1.0, 0.0),  # all heads of layer 3 loop at gate 1 in step 4; layer 2 is still ordinary
        4: (0.75, 0.0),
        5: (0.5, 0.0),
        6: (0.25, 0.0),
        7: (0.0, 1.0),
        8: (0.0, 0.75),
        9: (0.0, 0.5),
        10: (0.0, 0.25),
        11: (0.0, 0.0),
        12: (0.0, 0.0),
        13: (0.0, 0.0),
    }
    assert schedule.plan == LoopPlan(5, ((2, LayerPlan(1, (0,))), (3, LayerPlan(1, (0,)))))
    assert list(schedule.plan.loops) == [0, 0, 1, 1, 0]


def test_gates_table_is_one_where_nothing_loops() -> None:
    schedule = make()
    assert (schedule.plan.gates(schedule.num_heads) == 1.0).all()
    drive(schedule, range(1, 5), [0.9, 0.2, 0.5, 0.6, 0.1])
    expected = np.ones((5, 2))
    expected[3] = [1.0, 0.75]
    assert schedule.plan.gates(schedule.num_heads).tolist() == expected.tolist()


def test_plan_handed_out_earlier_does_not_change() -> None:
    schedule = make()
    drive(schedule, range(1, 4), [0.9, 0.2, 0.5, 0.6, 0.1])
    plan, text = schedule.plan, schedule.plan.fingerprint()
    drive(schedule, range(4, 9), [0.9, 0.2, 0.5, 0.6, 0.1])
    assert plan.fingerprint() == text and schedule.plan != plan


def test_depth_comes_before_the_next_layer_and_leaves_gates_alone() -> None:
    schedule = make(max_loop_depth=2)
    scores = [0.9, 0.2, 0.5, 0.6, 0.1]
    events = drive(schedule, range(1, 8), scores)
    assert brief(events) == [(3, "first_selection", 3), (7, "increase_depth", 3)]
    assert schedule.plan[3] == LayerPlan(2, (0,))  # the window of step 7 lets no head in again
    events = drive(schedule, range(8, 20), scores)
    assert brief(events) == [(11, "select_new_layer", 2), (15, "increase_depth", 2), (19, "fixed", None)]
    assert list(schedule.plan.loops) == [0, 0, 2, 2, 0]


@pytest.mark.parametrize("resumed", [False, True])
def test_depth_goes_to_the_layer_selected_first(resumed: bool) -> None:
    schedule = make(max_loop_depth=2)
    drive(schedule, range(1, 7), [0.9, 0.2, 0.5, 0.6, 0.1])
    # Layer 3 has left the top-k when its window ends: layer 2 is selected instead.
    assert brief(drive(schedule, range(7, 8), [0.9, 0.4, 0.5, 0.1, 0.1])) == [(7, "select_new_layer", 2)]
    if resumed:
        state = json.loads(json.dumps(schedule.state_dict(), sort_keys=True))
        schedule = make(max_loop_depth=2)
        schedule.load_state_dict(state)
    # Both are in the top-k again and may deepen: layer 3 was selected first, although layer 2 scores higher.
    assert brief(drive(schedule, range(8, 16), [0.9, 0.2, 0.7, 0.6, 0.1])) == [
        (11, "increase_depth", 3),
        (15, "increase_depth", 2),
    ]


def test_deeper_candidates_do_not_count() -> None:
    schedule = make()
    drive(schedule, range(1, 4), [0.9, 0.2, 0.5, 0.6, 0.1])
    events = drive(schedule, range(4, 8), [0.9, 0.2, 0.1, 0.6, 0.7])
    assert brief(events) == [(7, "fixed", None)]
    assert drive(schedule, range(8, 30), [0.9, 0.8, 0.7, 0.1, 0.1]) == []


def test_shallow_to_deep_mirrors() -> None:
    schedule = make(direction="shallow_to_deep")
    events = drive(schedule, range(1, 12), [0.9, 0.2, 0.5, 0.6, 0.1])
    assert brief(events) == [(3, "first_selection", 2), (7, "select_new_layer", 3), (11, "fixed", None)]


def test_empty_top_k_fixes_an_ungrown_model() -> None:
    schedule = make(exclude_layers=(0, 1, 2, 3, 4))
    assert brief(drive(schedule, range(1, 10), [0.5] * 5)) == [(3, "fixed", None)]
    assert schedule.plan == LoopPlan.empty(5) and not schedule.wanted


def test_selection_that_comes_late_happens_at_once() -> None:
    schedule = make()
    schedule.observe("entropy", table([0.9, 0.2, 0.5, 0.6, 0.1]))
    assert schedule.decides_at(100)
    assert brief(schedule.after_step(100)) == [(100, "first_selection", 3)]
    assert not schedule.decides_at(103) and schedule.decides_at(104)


def test_steps_missing_at_a_window_end_only_delay_the_decision() -> None:
    schedule = make()
    scores = [0.9, 0.2, 0.5, 0.6, 0.1]
    drive(schedule, range(1, 6), scores)
    schedule.observe("entropy", table(scores))
    assert brief(schedule.after_step(9)) == [(9, "select_new_layer", 2)]
    assert schedule.plan[3].other_gate == 0.0 and schedule.plan[2].other_gate == 1.0
    assert not schedule.decides_at(12) and schedule.decides_at(13)


@pytest.mark.parametrize("step", [5, 4])
def test_a_step_cannot_be_taken_twice(step: int) -> None:
    schedule = make()
    drive(schedule, range(1, 6), [0.5] * 5)
    with pytest.raises(ValueError, match=f"after step 5; it cannot act after step {step}"):
        schedule.after_step(step)


def test_all_heads_never_fade() -> None:
    schedule = make(head_choice="all")
    events = drive(schedule, range(1, 4), [0.9, 0.2, 0.5, 0.6, 0.1])
    assert events[0].kept_heads == {3: (0, 1)}
    prints = set()
    for step in range(4, 7):
        drive(schedule, range(step, step + 1), [0.9, 0.2, 0.5, 0.6, 0.1])
        prints.add(schedule.plan.fingerprint())
        assert (schedule.plan.gates(schedule.num_heads) == 1.0).all()
    assert len(prints) == 1 and schedule.plan[3].phase == "sparse"
    assert schedule.plan.inference() == schedule.plan


def test_random_heads_follow_the_seed_and_not_the_entropies() -> None:
    def kept(seed: int, scores: list[float]) -> tuple[int, ...]:
        schedule = make(num_heads=16, num_keep_heads=4, head_choice="random", seed=seed)
        return drive(schedule, range(1, 4), scores)[0].kept_heads[3]

    assert kept(1, [0.9, 0.2, 0.5, 0.6, 0.1]) == kept(1, [0.1, 0.2, 0.3, 0.4, 0.1])
    assert kept(1, [0.9, 0.2, 0.5, 0.6, 0.1]) != kept(2, [0.9, 0.2, 0.5, 0.6, 0.1])


def test_ema_starts_at_zero_and_weighs_the_past() -> None:
    schedule = make(ema_decay=0.75)
    schedule.observe("entropy", np.full((5, 2, 2), 0.8))
    assert schedule.ema == pytest.approx(np.full((5, 2), 0.2))
    schedule.observe("entropy", np.full((5, 2, 2), 0.4))
    assert schedule.ema == pytest.approx(np.full((5, 2), 0.25))
    schedule.ema[:] = 7.0
    assert schedule.ema.max() < 1.0


def test_kept_heads_feed_their_last_pass_and_others_the_first() -> None:
    schedule = make(max_loop_depth=3, exclude_layers=(0, 1, 2, 4))
    seen = np.arange(4)[None, :, None] / 10 + np.zeros((5, 4, 2))
    drive(schedule, range(1, 4), [0.5] * 5)
    for window_end, loops in ((7, 1), (11, 2), (15, 3)):
        assert list(schedule.plan.loops)[3] == loops
        for step in range(window_end - 3, window_end + 1):
            schedule.observe("entropy", seen)
            assert schedule.ema[3].tolist() == [loops / 10, 0.0]
            assert (schedule.ema[[0, 1, 2, 4]] == 0.0).all()
            schedule.after_step(step)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_entropies_leave_their_head_alone(bad: float) -> None:
    schedule = make(ema_decay=0.5)
    schedule.observe("entropy", np.full((5, 2, 2), 0.8))
    entropies = np.full((5, 2, 2), 0.6)
    entropies[2, 0, 1] = bad
    entropies[:, 1] = bad  # passes that did not run are not read
    schedule.observe("entropy", entropies)
    expected = np.full((5, 2), 0.5)
    expected[2, 1] = 0.4
    assert schedule.ema == pytest.approx(expected)
    entropies[2, 0, 1] = 0.0
    schedule.observe("entropy", entropies)
    assert schedule.ema[2].tolist() == pytest.approx([0.55, 0.2])


def test_wrong_table_is_refused() -> None:
    schedule = make(max_loop_depth=2)
    with pytest.raises(ValueError, match=r"\(5, 2, 2\).*\(5, 3, 2\)"):
        schedule.observe("entropy", np.zeros((5, 2, 2)))


@pytest.mark.parametrize("monitoring", [False, True])
def test_entropy_ends_with_the_structure_unless_monitored(monitoring: bool) -> None:
    schedule = make(max_selected_layers=1, entropy_after_fixed=monitoring)
    drive(schedule, range(1, 7), [0.9, 0.2, 0.5, 0.6, 0.1])
    assert schedule.wanted
    drive(schedule, range(7, 8), [0.9, 0.2, 0.5, 0.6, 0.1])
    assert schedule.phase == "fixed" and bool(schedule.wanted) == monitoring
    before = schedule.ema
    assert drive(schedule, range(8, 20), [0.1, 0.8, 0.7, 0.6, 0.5]) == []
    assert (schedule.ema == before).all() != monitoring
    assert list(schedule.plan.loops) == [0, 0, 0, 1, 0]


@pytest.mark.parametrize("stop", range(1, 20))
def test_resumption_is_exact_at_every_step(stop: int) -> None:
    def run(interrupted: bool) -> list[Any]:
        rng = np.random.default_rng(3)
        schedule = make(6, 4, max_loop_depth=2, num_keep_heads=2, ema_decay=0.3, decay_type="cosine")
        seen: list[Any] = []
        for step in range(1, 40):
            schedule.observe("entropy", rng.random((6, 3, 4)))
            events = [event.to_dict() for event in schedule.after_step(step)]
            if interrupted and step == stop:
                state = json.loads(json.dumps(schedule.state_dict()))
                schedule = SGTSchedule(schedule.config, 6, 4)
                schedule.load_state_dict(state)
                assert schedule.state_dict() == state
            seen.append((events, schedule.plan.to_dict(), schedule.ema.tolist(), schedule.phase))
        return seen

    assert run(True) == run(False)


def test_a_saved_state_is_not_touched_by_going_on() -> None:
    schedule = make()
    drive(schedule, range(1, 5), [0.9, 0.2, 0.5, 0.6, 0.1])
    state = schedule.state_dict()
    text = json.dumps(state)
    drive(schedule, range(5, 9), [0.9, 0.2, 0.5, 0.6, 0.1])
    assert json.dumps(state) == text


def test_a_resumed_schedule_refuses_the_steps_already_taken() -> None:
    schedule = make()
    drive(schedule, range(1, 5), [0.5] * 5)
    resumed = make()
    resumed.load_state_dict(schedule.state_dict())
    with pytest.raises(ValueError, match="after step 4"):
        resumed.after_step(4)


def test_a_state_of_another_run_is_refused_by_name() -> None:
    state = make().state_dict()
    other = make(7, 4, window_size=9, head_choice="all")
    with pytest.raises(CheckpointError) as caught:
        other.load_state_dict(state)
    message = str(caught.value)
    assert "num_layers (checkpoint 5, run 7)" in message
    assert "num_heads (checkpoint 2, run 4)" in message
    assert "growth.window_size (checkpoint 4, run 9)" in message
    assert "growth.head_choice (checkpoint 'highest', run 'all')" in message
    assert "ema_decay" not in message


def test_monitoring_may_be_switched_at_a_resume() -> None:
    schedule = make(entropy_after_fixed=True)
    schedule.load_state_dict(make().state_dict())
    assert schedule.wanted


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.pop("ema"),
        lambda state: state.pop("config"),
        lambda state: state.update(ema=[[0.0]]),
        lambda state: state.update(ema=[[0.0], [0.0, 1.0]]),
        lambda state: state.update(phase="growing"),
        lambda state: state.update(grown=[{"layer": 1}]),
        lambda state: state.update(step="soon"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Any) -> None:
    source = make()
    drive(source, range(1, 5), [0.9, 0.2, 0.5, 0.6, 0.1])
    state = source.state_dict()
    damage(state)
    schedule = make()
    before = schedule.state_dict()
    with pytest.raises(CheckpointError, match="damaged"):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == before
