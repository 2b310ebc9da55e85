"""The mask in the model itself: the function is preserved, the mask is exact, and at 1 nothing of it is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt import extensions
from megatron_sgt.arch.ffn import FFNKind
from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model import gpt, mlp
from megatron_sgt.model.apply_plan import apply_plan, begin_step
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.model.hf_weights import megatron_shard
from megatron_sgt.model.ramp import RampMask, fold
from megatron_sgt.stages.config import grown_config
from megatron_sgt.stages.operators import OPERATORS
from megatron_sgt.stages.ramp import masked_weights
from tests.helpers.fake_groups import fake_groups
from tests.helpers.growing import Params, grown, random_params
from tests.helpers.single import random_batch, single_model, small_config
from tests.helpers.variants import hf_of

GROWTHS: dict[str, dict[str, Any]] = {
    "units": {"ffn_hidden_size": 130},
    "layers": {"num_layers": 6},
    "both": {"ffn_hidden_size": 130, "num_layers": 6},
}
KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "gelu with biases": {"activation": "gelu", "add_bias_linear": True, "normalization": "LayerNorm"},
    "OLMo-2": {"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all", "num_query_groups": 2},
}
LOOPS = LoopPlan(4, ((1, LayerPlan(1, (0, 3))), (3, LayerPlan(2, (1, 2), 0.5))))


def configs(kind: str, growth: str) -> tuple[Config, Config, Params, Params]:
    """Of a model and of the grown one, with their weights."""
    old = small_config(model={**KINDS[kind], "init_method_std": 0.3})
    made = OPERATORS["msg"](old.model, {**GROWTHS[growth], "ramp_steps": 4})
    params = random_params(old.model)
    return old, grown_config(old, made, 0), params, grown(made, params)


def loaded(config: Config, params: Params, dtype: torch.dtype = torch.float64) -> LanguageModel:
    model = single_model(config).to(dtype)
    model.gpt.load_state_dict(megatron_shard(params, config.model), strict=False)
    return model.eval()


def masked(config: Config, params: Params, value: float | None, dtype: torch.dtype = torch.float64) -> LanguageModel:
    """The grown model at a mask; None: that has never heard of one."""
    model = loaded(config, params, dtype)
    if value is not None:
        RampMask(model, config, fake_groups()).set(value)
    return model


def logits(model: LanguageModel, config: Config) -> Tensor:
    return model.logits(random_batch(config)["tokens"])


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_function_is_preserved(kind: str, growth: str) -> None:
    old, new, before, after = configs(kind, growth)
    small, large = loaded(old, before), masked(new, after, 0.0)
    assert gap(logits(large, new), logits(small, old)) <= 1e-12
    for model, layers in ((small, 4), (large, new.model.num_layers)):
        apply_plan(model, LoopPlan(layers, LOOPS.layers))
    looping = logits(small, old)
    assert gap(logits(large, new), looping) <= 1e-12
    # Controls: without the mask, and with a little of it, the function is another one.
    assert gap(logits(masked(new, after, None), new), logits(loaded(old, before), old)) > 0.1
    assert gap(logits(masked(new, after, 0.25), new), logits(loaded(old, before), old)) > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_of_1_is_no_mask(kind: str) -> None:
    """Bit for bit, and with the same operations in the graph."""
    _, new, _, after = configs(kind, "both")
    plain = masked(new, after, None, torch.float32).train()
    ramped = masked(new, after, 0.5, torch.float32).train()
    mask, batch = RampMask(ramped, new, fake_groups()), random_batch(new)
    half = ramped(**batch)
    mask.set(1.0)
    losses = [model(**batch) for model in (plain, ramped)]
    assert torch.equal(*losses) and not torch.equal(half, losses[0])
    assert names(losses[0]) == names(losses[1]) != names(half)
    for loss in losses:
        loss.backward()
    for (name, one), (_, other) in zip(plain.named_parameters(), ramped.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad), name
    assert plain.state_dict().keys() == ramped.state_dict().keys()


def names(loss: Tensor) -> list[str]:
    """The operations of the graph behind ``loss``, sorted."""
    seen, waiting, found = set(), [loss.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.append(node.name())
        waiting += [function for function, _ in node.next_functions]
    return sorted(found)


@pytest.mark.parametrize("growth", GROWTHS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_exact_in_the_weights(kind: str, growth: str) -> None:
    """Folded weights, in a model without a mask, compute what the masked model does, loops included."""
    _, new, _, after = configs(kind, growth)
    table, folded = masked_weights(new.model, new.growth.ramp), dict(after)
    for one in table.values():
        folded |= fold({name: after[name] for name in one.weight.hf}, one, 0.3)
    plan = LoopPlan(new.model.num_layers, (*LOOPS.layers[:1], (new.model.num_layers - 1, LayerPlan(1, (0, 2)))))
    models = [masked(new, folded, None), masked(new, after, 0.3), masked(new, after, None)]
    for model in models:
        apply_plan(model, plan)
    exact, found, unmasked = (logits(model, new) for model in models)
    assert gap(found, exact) <= 1e-12 and gap(unmasked, exact) > 0.01


def test_half_precision_stays_half_precision() -> None:
    """A mask of another type would make everything behind it fp32."""
    _, new, _, after = configs("gelu with biases", "both")
    half, exact = (masked(new, after, 0.3, dtype) for dtype in (torch.bfloat16, torch.float64))
    with torch.no_grad():
        inner, bias = half.gpt.decoder.layers[5].mlp.linear_fc1(torch.ones(3, 1, 64, dtype=torch.bfloat16))
    assert inner.dtype == bias.dtype == torch.bfloat16 and bool(inner[:, :, 96:].any())
    found, expected = logits(half, new).double(), logits(exact, new)
    assert float((found - expected).norm() / expected.norm()) < 0.1


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_gradients_of_new_parts_come_with_the_mask(value: float) -> None:
    """At 0 all are exactly 0, as stages/ramp.py derives; above, none of a unit's three and of a layer's matrices is."""
    _, new, _, after = configs("swiglu", "both")
    model = masked(new, after, value).train()
    model(**random_batch(new)).backward()
    found = hf_of(model, new, grads=True)
    down = found["model.layers.1.mlp.down_proj.weight"]
    parts = {"down": down[:, 96:].T}
    parts |= {name: found[f"model.layers.1.mlp.{name}_proj.weight"][96:] for name in ("gate", "up")}
    for name, part in parts.items():
        assert bool(part.any(dim=1).all()) if value else not part.any(), name
    for name in [n for n in found if n.startswith("model.layers.5.")]:
        assert bool(found[name].any()) == bool(value), name
    assert bool(down[:, :96].any(dim=0).all()), "old units learn all the time"


def test_fused_loops_of_a_new_layer_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    _, new, _, after = configs("swiglu", "layers")
    found = []
    for way in ("torch", "triton"):
        monkeypatch.setattr(gpt, "loop_backend", lambda *_, way=way: (way, ""))
        model = masked(new, after, 0.3, torch.float32)
        apply_plan(model, LoopPlan(6, ((5, LayerPlan(2, (0, 3))),)))
        begin_step(model)
        found.append(logits(model, new))
    assert gap(*found) < 2e-5


def test_a_module_that_no_mask_reaches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    extensions.register("ffn", "own", FFNKind("own", False, "gelu", 2, activated=("up_proj",)))
    spec = mlp.mlp_spec()
    spec.submodules.linear_fc1 = mlp.MaskedColumnParallelLinear.__base__
    monkeypatch.setitem(mlp.FFN_MODULES, "own", mlp.FFNModule(spec, torch.nn.functional.gelu))
    try:
        ramp = {"first": 0, "steps": 2, "old_units": 50}
        config = small_config(model={"activation": "own"}, growth={"ramp": ramp})
        with pytest.raises(ConfigError, match=r"mlp\.linear_fc1 is a ColumnParallelLinear, in which no mask"):
            RampMask(single_model(config), config, fake_groups())
    finally:
        extensions.unregister("ffn", "own")
