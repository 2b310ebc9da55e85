"""What a layer costs: against the step's operations of the whole model, and its parts by hand."""

from __future__ import annotations

import pytest

from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.planning.flops import pass_flops, step_flops
from megatron_sgt.planning.layer_cost import layer_cost, output_cost
from megatron_sgt.planning.loop_cost import loop_flops
from tests.helpers.single import small_config

ORDINARY = LayerPlan()


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_layers_and_the_output_are_the_model(ranks: int) -> None:
    config = small_config(parallel={"tensor_model_parallel_size": ranks})
    whole = step_flops(config.model, LoopPlan.empty(4), config.train.micro_batch_size)
    parts = sum(layer_cost(config, layer, ORDINARY, "owner").total for layer in range(4)) + output_cost(config)
    assert parts == pytest.approx((3 * whole.linear + 1.75 * whole.attention) / ranks)


def test_recompute_and_loops() -> None:
    plain, some = (
        small_config(train={"recompute_granularity": how, **more})
        for how, more in (("none", {}), ("full", {"recompute_layers": [1]}))
    )
    once = pass_flops(plain.model, 0, plain.train.micro_batch_size)
    again = once.attention.linear + once.mlp.linear + once.attention.attention / 2
    costs = [layer_cost(some, layer, ORDINARY, "owner") for layer in range(2)]
    assert costs[1].ordinary - costs[0].ordinary == pytest.approx(again)
    selective = layer_cost(small_config(train={"recompute_granularity": "selective"}), 0, ORDINARY, "owner")
    assert selective.ordinary - costs[0].ordinary == pytest.approx(once.attention.attention / 2)
    block = layer_cost(some, 1, LayerPlan(block_loops=2), "owner")
    assert block.loops == pytest.approx(2 * costs[1].ordinary)
    sparse, flops = layer_cost(plain, 3, LayerPlan(2, (0, 1)), "owner"), loop_flops(plain, "owner", (0, 1), 0)
    assert sparse.loops == pytest.approx(2 * flops.needed)
    window = layer_cost(plain, 3, LayerPlan(1, (0, 1), 0.5), "owner")
    assert window.loops == pytest.approx(3 * once.attention.linear + 1.75 * once.attention.attention)
    assert layer_cost(plain, 3, LayerPlan(skipped=True), "owner").total == 0
