import pytest
import torch

from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.apply_plan import apply_plan, sgt_layers
from tests.helpers.single import random_batch, single_model, small_config

PLAN = LoopPlan(4, ((1, LayerPlan(2, (0, 3), 0.5)), (3, LayerPlan(block_loops=1))))


def test_every_layer_gets_its_part() -> None:
    model = single_model(small_config())
    apply_plan(model, PLAN)
    assert [layer.plan for layer in sgt_layers(model)] == list(PLAN)
    apply_plan(model, LoopPlan.empty(4))
    assert {layer.plan for layer in sgt_layers(model)} == {LayerPlan()}


def test_the_next_forward_obeys() -> None:
    config = small_config()
    model, batch = single_model(config).eval(), random_batch(config)
    with torch.no_grad():
        vanilla = model(**batch)
        apply_plan(model, PLAN)
        grown = model(**batch)
        apply_plan(model, PLAN.inference())
        inference = model(**batch)
        apply_plan(model, LoopPlan.empty(4))
        assert torch.equal(model(**batch), vanilla)
    assert len({vanilla.item(), grown.item(), inference.item()}) == 3


def test_layers_are_found_inside_any_wrapper_and_in_order() -> None:
    model = single_model(small_config())
    layers = sgt_layers(model)
    assert [layer.layer_id for layer in layers] == [0, 1, 2, 3]
    assert sgt_layers(torch.nn.ModuleDict({"wrapped": model})) == layers
    assert sgt_layers(torch.nn.ModuleList(reversed(layers))) == layers
    assert sgt_layers(single_model(small_config(), plain=True)) == []


def test_a_plan_of_another_depth_is_refused() -> None:
    with pytest.raises(IndexError, match="layer 2 of a plan with 2 layers"):
        apply_plan(single_model(small_config()), LoopPlan.empty(2))
