import numpy as np
import pytest

from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.growth import LayerPlan, LoopPlan, SGTSchedule, build_schedule
from megatron_sgt.growth.static import BlockLoop, Vanilla

BLOCK_LOOP = GrowthConfig(method="block_loop", block_loop_layers=(5, 3), block_loop_count=2)


def test_each_method_has_its_schedule() -> None:
    assert isinstance(build_schedule(GrowthConfig(), 8, 4), SGTSchedule)
    assert isinstance(build_schedule(GrowthConfig(method="vanilla"), 8, 4), Vanilla)
    assert isinstance(build_schedule(BLOCK_LOOP, 8, 4), BlockLoop)


@pytest.mark.parametrize(
    ("config", "plan", "phase"),
    [
        (GrowthConfig(method="vanilla"), LoopPlan.empty(8), "vanilla"),
        (BLOCK_LOOP, LoopPlan(8, tuple((n, LayerPlan(block_loops=2)) for n in (3, 5))), "fixed"),
    ],
)
def test_static_plans_never_change(config: GrowthConfig, plan: LoopPlan, phase: str) -> None:
    schedule = build_schedule(config, 8, 4)
    for step in (1, 249, 250, 251, 1000):
        assert not schedule.decides_at(step)
        assert schedule.after_step(step) == []
        assert schedule.plan == plan == schedule.plan.inference()
        assert schedule.phase == phase
        assert not schedule.wanted and not schedule.probes
        assert (schedule.plan.gates(4) == np.ones((8, 4))).all()
        assert schedule.report() == {}
        assert list(schedule.plan.loops) == [0] * 8


def test_a_block_loop_outside_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"\[5\] do not exist: choose layers 0\.\.4"):
        build_schedule(BLOCK_LOOP, 5, 4)


def test_static_state_round_trip_and_mismatch() -> None:
    state = build_schedule(BLOCK_LOOP, 8, 4).state_dict()
    build_schedule(BLOCK_LOOP, 8, 4).load_state_dict(state)
    for other in (GrowthConfig(method="vanilla"), GrowthConfig()):
        with pytest.raises(CheckpointError, match=r"growth\.method \(checkpoint 'block_loop', run"):
            build_schedule(other, 8, 4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="num_layers"):
        build_schedule(BLOCK_LOOP, 9, 4).load_state_dict(state)
    with pytest.raises(CheckpointError, match="damaged"):
        build_schedule(BLOCK_LOOP, 8, 4).load_state_dict({**state, "plan": None})
