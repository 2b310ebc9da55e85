"""The name in ``growth.method``: built-in, registered, or refused; and the settings of imported models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import Field

from megatron_sgt import extensions
from megatron_sgt.config import Config, parse_config
from megatron_sgt.config.base import Section
from megatron_sgt.config.growth import METHODS, GrowthConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import LayerPlan, LoopPlan, SGTSchedule, build_schedule
from megatron_sgt.growth.methods import BUILT_IN, settings_for, with_schedule
from megatron_sgt.growth.static import Vanilla
from tests.helpers.single import small_config


class Settings(Section):
    pace: int = Field(gt=0, description="Of growth.")
    names: tuple[str, ...] = Field(default=("a",), description="Of nothing.")


class Own(Vanilla):
    name = "own"
    Options = Settings


class Modest(Vanilla):
    name = "modest"


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    yield
    for name in extensions.names("schedules"):
        extensions.unregister("schedules", name)


def config_with(**growth: Any) -> Config:
    values = small_config().model_dump()
    return parse_config({**values, "growth": growth}, "f.yaml")


def test_the_configuration_knows_the_built_in_methods() -> None:
    assert (*BUILT_IN,) == METHODS


def test_a_registered_name_is_a_method_with_its_typed_options() -> None:
    extensions.register("schedules", "own", Own)
    growth = config_with(method="own", options={"pace": 3, "names": ["b"]}).growth
    schedule = build_schedule(growth, 4, 4)
    assert type(schedule) is Own and (schedule.options.pace, schedule.options.names) == (3, ("b",))
    assert schedule.state_dict()["config"]["options"] == {"pace": 3, "names": ["b"]}
    # Defaults are written out, so that a later version's other default is a difference.
    assert build_schedule(config_with(method="own", options={"pace": 3}).growth, 4, 4).identity()["config"][
        "options"
    ] == {"pace": 3, "names": ["a"]}


@pytest.mark.parametrize(
    ("growth", "message"),
    [
        ({"method": "own", "options": {"pace": 0}}, "growth.options.pace: must be > 0, got 0"),
        ({"method": "own", "options": {"pace": "1"}}, "growth.options.pace: must be an integer, got '1'"),
        ({"method": "own"}, "growth.options.pace: is required"),
        (
            {"method": "own", "options": {"pace": 1, "name": []}},
            "growth.options: unknown key 'name'; did you mean 'names'",
        ),
        ({"method": "own", "options": [1]}, "growth.options: must be a mapping"),
        (
            {"method": "modest", "options": {"pace": 1}},
            "growth.options: {'pace': 1} has no effect with method 'modest'",
        ),
        ({"options": {"pace": 1}}, "growth.options: {'pace': 1} has no effect with method 'sgt'"),
        ({"method": "owm"}, "must be 'sgt', 'vanilla', 'block_loop', 'modest' or 'own', got 'owm'; did you mean 'own'"),
        ({"method": "os.system"}, "must be 'sgt', 'vanilla', 'block_loop', 'modest' or 'own'"),
        ({"method": "own", "options": {"pace": 1}, "replay": "x"}, "growth.replay: has no effect with method 'own'"),
    ],
)  # fmt: skip
def test_mistakes_are_named_as_everywhere(growth: dict[str, Any], message: str) -> None:
    extensions.register("schedules", "own", Own)
    extensions.register("schedules", "modest", Modest)
    with pytest.raises(ConfigError) as refused:
        config_with(**growth)
    assert message in str(refused.value)


class Curious(Vanilla):
    name = "curious"
    probes = frozenset({"entropy", "gradients"})


@pytest.mark.parametrize(
    ("name", "registered", "message"),
    [
        ("own", "not a class", "which is no Schedule class"),
        ("theirs", Modest, "is registered as Modest, whose name is 'modest'"),
        ("curious", Curious, r"wants to observe \['gradients'\], which training does not measure"),
    ],
)
def test_what_is_registered_must_be_a_schedule_of_that_name(name: str, registered: Any, message: str) -> None:
    extensions.register("schedules", name, registered)
    with pytest.raises(ConfigError, match=message):
        build_schedule(GrowthConfig(method=name), 4, 4)


def test_a_schedule_given_in_python_becomes_the_method() -> None:
    config = with_schedule(small_config(), Modest)
    assert config.growth.method == "modest" == with_schedule(config, Modest).growth.method
    stage = {"until_steps": 4, "operator": "g_stack"}
    growing = small_config(growth={"stages": [stage]})
    assert with_schedule(growing, Modest).growth.stages == growing.growth.stages
    assert parse_config(config.model_dump()) == config, "and the process knows it from then on"
    with pytest.raises(ConfigError, match=r"growth\.options\.pace: is required"):
        with_schedule(small_config(), Own)
    with pytest.raises(ConfigError, match="'sgt' is a built-in method"):
        with_schedule(small_config(), SGTSchedule)
    with pytest.raises(ConfigError, match="'modest' is registered for another schedule"):
        with_schedule(small_config(), type("Modest", (Vanilla,), {"name": "modest"}))


@pytest.mark.parametrize(
    "plan",
    [
        LoopPlan.empty(4),
        LoopPlan.empty(1),
        LoopPlan(4, ((0, LayerPlan(2, (1, 3))), (3, LayerPlan(1, (0,))))),
        LoopPlan(1, ((0, LayerPlan(1, (0,))),)),
        LoopPlan(4, tuple((n, LayerPlan(block_loops=2)) for n in (1, 2))),
    ],
)
def test_the_settings_for_a_finished_plan_can_adopt_it(plan: LoopPlan) -> None:
    model = {**small_config().model.model_dump(), "num_layers": plan.num_layers}
    config = parse_config({**small_config().model_dump(), "model": model, "growth": settings_for(plan, 4)})
    schedule = build_schedule(config.growth, plan.num_layers, 4)
    if plan.layers:
        schedule.adopt(plan)
        assert schedule.phase == "fixed" and not schedule.wanted and schedule.selected_at() == {}
        assert schedule.after_step(1) == []
    assert schedule.plan == plan


def test_loops_that_a_method_cannot_have_made_are_refused() -> None:
    deep = LoopPlan(4, ((1, LayerPlan(3, (0,))),))
    blocks = LoopPlan(4, ((1, LayerPlan(block_loops=2)),))
    with pytest.raises(ConfigError, match=r"growth\.max_loop_depth: is 1, but the loops of the given model need 3"):
        build_schedule(GrowthConfig(), 4, 4).adopt(deep)
    for method in (
        GrowthConfig(method="block_loop", block_loop_layers=(2,)),
        GrowthConfig(),
        GrowthConfig(method="vanilla"),
    ):
        with pytest.raises(ConfigError, match=rf"growth\.method: is {method.method}"):
            build_schedule(method, 4, 4).adopt(blocks)
    with pytest.raises(ConfigError, match="not both"):
        settings_for(LoopPlan(4, (*deep.layers, (2, LayerPlan(block_loops=1)))), 4)


def test_a_schedule_of_the_caller_s_own_leaves_out_what_belongs_to_other_methods() -> None:
    blocks = small_config(growth={"method": "block_loop", "block_loop_layers": [1]})
    assert with_schedule(blocks, Modest).growth.block_loop_layers == ()
    repeated = small_config(growth={"replay": "nowhere.jsonl"})
    assert with_schedule(repeated, Modest).growth.replay is None
