"""The structures that a configuration can pass through."""

from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.planning.structure import final_plan
from tests.helpers.single import small_config


def test_the_final_plan_is_the_costliest() -> None:
    config = small_config(growth={"max_loop_depth": 2, "num_keep_heads": 2, "max_selected_layers": 2})
    grown = LayerPlan(2, (0, 2))
    assert final_plan(config) == LoopPlan(4, ((2, grown), (3, grown)))
    beside = LayerPlan(2, (0, 1))
    assert final_plan(config, together=True) == LoopPlan(4, ((2, beside), (3, beside)))
    everything = small_config(growth={"head_choice": "all", "max_selected_layers": 1})
    assert final_plan(everything)[3].kept_heads == (0, 1, 2, 3)
    assert final_plan(small_config(growth={"method": "vanilla"})) == LoopPlan.empty(4)
    repeated = small_config(growth={"method": "block_loop", "block_loop_layers": [1], "block_loop_count": 2})
    assert final_plan(repeated) == LoopPlan(4, ((1, LayerPlan(block_loops=2)),))
