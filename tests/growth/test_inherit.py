"""A schedule that goes on when the model under it has become deeper or wider."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import SGTSchedule
from megatron_sgt.growth.inherit import Inheritance
from megatron_sgt.growth.static import BlockLoop, Vanilla
from tests.growth.test_schedule import Upwards, upwards

STACKED = Inheritance((0, 1, 2, 3) * 2, (4, 5, 6, 7), (0, 1))
INSERTED = Inheritance((0, 1, 1, 2, 3), (0, 1, 3, 4), (0, 1))


def sgt(num_layers: int = 4, num_heads: int = 2, **settings: Any) -> SGTSchedule:
    shape = {"first_selection_step": 2, "window_size": 4, "max_selected_layers": 2, "num_keep_heads": 1}
    return SGTSchedule(
        GrowthConfig(**{**shape, "top_k_layers": 2, "ema_decay": 0.0, **settings}), num_layers, num_heads
    )


def trained(schedule: SGTSchedule, last: int, first: int = 1) -> SGTSchedule:
    """The entropies of layer n and head h are (n + 1) / 10 + h / 100, so that layer 3 is selected first."""
    layers, heads = schedule.num_layers, schedule.num_heads
    table = (np.arange(layers)[:, None] + 1) / 10 + np.arange(heads) / 100
    for step in range(first, last + 1):
        if schedule.wanted:
            schedule.observe("entropy", np.repeat(table[:, None], 1 + schedule.max_loops, axis=1))
        schedule.after_step(step)
    return schedule


@pytest.mark.parametrize(("grown", "heir"), [(STACKED, 7), (INSERTED, 4)])
def test_one_copy_goes_on_looping_where_its_source_was(grown: Inheritance, heir: int) -> None:
    older, younger = trained(sgt(), 3), sgt(len(grown.layers))
    younger.inherit(older, grown)
    assert dict(younger.plan.layers) == {heir: older.plan[3]}, "the same heads, inside the same window"
    assert np.array_equal(younger.ema, older.ema[list(grown.layers)])
    assert (younger.phase, younger.window_end) == (older.phase, older.window_end)
    assert younger.plan[heir].other_gate == 0.75
    trained(older, 5, first=4)
    trained(younger, 5, first=4)
    assert younger.plan[heir] == older.plan[3]
    restored = sgt(len(grown.layers))
    restored.load_state_dict(younger.state_dict())
    assert restored.plan == younger.plan


def test_copies_that_no_rule_reaches_are_named() -> None:
    younger = sgt(5)
    assert younger.inherit(trained(sgt(), 3), INSERTED) == []
    below = Inheritance((0, 1, 2, 3, 3), (0, 1, 2, 3), (0, 1))
    (note,) = sgt(5).inherit(trained(sgt(), 3), below)
    assert note == "layers [4] are deeper than 3, the shallowest that loops, so that none is ever selected"
    assert sgt(5).inherit(sgt(), below) == [], "nothing has been selected yet"
    mirrored, above = {"direction": "shallow_to_deep"}, Inheritance((0, 1, 2, 2, 3), (0, 1, 3, 4), (0, 1))
    older = trained(sgt(**mirrored), 3)
    assert older.plan.layers[0][0] == 2
    (note,) = sgt(5, **mirrored).inherit(older, above)
    assert note == "layers [2] are shallower than 3, the deepest that loops, so that none is ever selected"
    assert sgt(5, **mirrored).inherit(older, below) == []


def test_a_new_head_has_the_mean_entropy_of_its_layer() -> None:
    older, younger = trained(sgt(), 1), sgt(num_heads=3)
    younger.inherit(older, Inheritance((0, 1, 2, 3), (0, 1, 2, 3), (0, 1, -1)))
    assert np.array_equal(younger.ema[:, :2], older.ema)
    assert np.allclose(younger.ema[:, 2], older.ema.mean(axis=1))


def test_a_kept_head_keeps_its_number() -> None:
    moved = Inheritance((0, 1, 2, 3), (0, 1, 2, 3), (0, -1, 1))
    older = trained(sgt(), 3)
    assert older.plan[3].kept_heads == (1,)
    with pytest.raises(ConfigError, match=r"heads \[1\] are kept by looping layers"):
        sgt(num_heads=3).inherit(older, moved)
    sgt(num_heads=3).inherit(trained(sgt(), 1), moved)


@pytest.mark.parametrize(("step", "refused"), [(74, False), (75, False), (76, True), (99, True), (100, False)])
def test_entropies_that_are_measured_late_must_be_measured_in_full(step: int, refused: bool) -> None:
    settings = {"exact_ema": False, "ema_decay": 0.5, "first_selection_step": 100, "window_size": 100}
    older = trained(sgt(**settings), step)
    if not refused:
        sgt(5, **settings).inherit(older, INSERTED)
        return
    with pytest.raises(ConfigError, match="the decision of step 100 rests on the steps from 76 on"):
        sgt(5, **settings).inherit(older, INSERTED)


@pytest.mark.parametrize("step", [74, 75, 76, 99, 100, 175, 176, 199, 200, 299, 300, 500])
@pytest.mark.parametrize("measured", [{"exact_ema": False}, {}, {"exact_ema": False, "entropy_after_fixed": True}])
def test_what_a_run_would_meet_is_known_before_it(step: int, measured: dict[str, bool]) -> None:
    """Of a run that decides whenever it may, at steps 100, 200 and 300."""
    settings = {"ema_decay": 0.5, "first_selection_step": 100, "window_size": 100, **measured}
    older = trained(sgt(**settings), step)
    refusals = []
    for check in (
        lambda: sgt(5, **settings).inherit(older, INSERTED),
        lambda: sgt(**settings).check_growth(step, INSERTED),
    ):
        try:
            check()
            refusals.append("")
        except ConfigError as error:
            refusals.append(str(error))
    assert refusals[0] == refusals[1]
    assert bool(refusals[0]) == (measured == {"exact_ema": False} and step in (76, 99, 176, 199, 299))


def test_heads_may_move_before_any_is_kept() -> None:
    moved = Inheritance((0, 1, 2, 3), (0, 1, 2, 3), (0, -1, 1))
    sgt().check_growth(1, moved)
    with pytest.raises(ConfigError, match=r"heads \[1\] would get other numbers, .*first_selection_step 2 on"):
        sgt().check_growth(2, moved)


def test_other_rules() -> None:
    assert Vanilla(GrowthConfig(method="vanilla"), 5, 2).inherit(Vanilla(GrowthConfig(), 4, 2), INSERTED) == []
    looping = GrowthConfig(method="block_loop", block_loop_layers=(1, 2))
    assert BlockLoop(looping, 5, 2).inherit(BlockLoop(looping, 4, 2), INSERTED) == []
    for refused in (lambda: upwards().inherit(upwards(), INSERTED), lambda: upwards().check_growth(1, INSERTED)):
        with pytest.raises(ConfigError, match="upwards has no method inherit"):
            refused()
    BlockLoop(looping, 4, 2).check_growth(1, INSERTED)

    class Forgetful(Upwards):
        def progress(self) -> dict[str, Any]:
            return {}

    assert upwards().inherit(upwards(Forgetful), INSERTED) == []
    upwards(Forgetful).check_growth(1, INSERTED)
