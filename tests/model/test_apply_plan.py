from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.apply_plan import apply_plan, sgt_layers
from megatron_sgt.model.entropy_meter import EntropyMeter
from megatron_sgt.model.head_loop import DenseLoop, SparseLoop
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


class CopiesToDevice(TorchDispatchMode):
    """Counts copies of host tensors to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device != out.device:
            assert kwargs["non_blocking"]
            self.count += 1
        return out


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> CopiesToDevice:
    """A counter that sees torch.tensor too, which copies without a dispatch."""
    counter, tensor = CopiesToDevice(), torch.tensor

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        counter.count += kwargs.get("device", "cpu") != "cpu"
        return tensor(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", counted)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    return counter


def window(gate: float, *layers: int) -> LoopPlan:
    return LoopPlan(4, tuple((layer, LayerPlan(1, (0, 3), gate)) for layer in layers))


def test_the_gates_of_a_window_reach_the_device_in_one_copy(copies: CopiesToDevice) -> None:
    """Two layers enter a window, their gates change, and one of them leaves it; the weights are offloaded."""
    model = single_model(small_config())
    for layer in sgt_layers(model):
        core = layer.self_attention.core_attention
        core.meter = EntropyMeter(4, 3, core.meter.layout, torch.device("meta"))
    plans = [window(0.75, 1, 3), window(0.5, 1, 3), window(0.0, 1, 3), window(0.0, 1, 3), LoopPlan.empty(4)]
    counts = []
    for plan in plans:
        with copies:
            apply_plan(model, plan)
        counts.append(copies.count)
        for layer in sgt_layers(model):
            if isinstance(layer.loop_pass, DenseLoop):
                assert layer.loop_pass.gates.device.type == "meta"
            elif isinstance(layer.loop_pass, SparseLoop):
                blocks = vars(layer.loop_pass.blocks).values()
                assert {t.device.type for t in blocks if isinstance(t, Tensor)} == {"meta"}
    assert counts == [1, 2, 3, 3, 3]
