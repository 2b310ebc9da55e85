"""Ranks that execute different structures stop, on all ranks, naming both plans."""

from megatron_sgt.engine.build import start_processes
from megatron_sgt.engine.plan_check import PlanMismatchError, verify_same_plan
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan, executed_plan
from megatron_sgt.model.gpt import build_model
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import single_groups, single_model, small_config


def _verify(info: RankInfo, heads: tuple[tuple[int, ...], ...]) -> str:
    config = small_config()
    groups = start_processes(config, info)
    model = build_model(config, groups, "fp32", 2)
    apply_plan(model, LoopPlan(4, ((2, LayerPlan(1, heads[info.rank])),)))
    try:
        verify_same_plan(model, groups)
    except PlanMismatchError as error:
        return str(error)
    return ""


def test_equal_plans_pass() -> None:
    assert run_on_ranks(2, _verify, ((0, 1), (0, 1))) == ["", ""]


def test_a_differing_rank_is_named_everywhere() -> None:
    messages = run_on_ranks(2, _verify, ((0, 1), (0, 2)))
    assert messages[0] == messages[1]
    for part in ("rank 1", "rank 0", "kept_heads=(0, 2)", "kept_heads=(0, 1)"):
        assert part in messages[0]


def test_the_executed_plan_is_read_from_the_layers() -> None:
    config = small_config()
    model = single_model(config)
    plan = LoopPlan(4, ((1, LayerPlan(2, (0, 3), 0.5)),))
    apply_plan(model, plan)
    assert executed_plan(model) == plan
    verify_same_plan(model, single_groups(config))  # alone there is nobody to differ from


def test_the_error_is_no_usage_error() -> None:
    assert PlanMismatchError.exit_code == 1
