"""With the empty plan an SGT layer is Megatron-Core's, bit for bit; block loops against the reference."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.apply_plan import apply_plan, sgt_layers
from megatron_sgt.model.gpt import LanguageModel, build_model
from megatron_sgt.model.head_loop import SparseLoop
from megatron_sgt.model.layer import SGTLayer
from tests.helpers.reference_sgt import forward
from tests.helpers.single import random_batch, single_groups, single_model, small_config
from tests.helpers.variants import (
    hf_of,
    largest_difference,
    leaves,
    make_weights_uneven,
    reference_settings,
)

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "multi_head": {},
    "grouped_query": {"model": {"num_query_groups": 2}},
    "gelu_layer_norm_bias_tied": {
        "model": {
            "activation": "gelu",
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "untie_embeddings_and_output_weights": False,
        }
    },
    "qk_norm_wide_heads": {"model": {"qk_layernorm": True, "kv_channels": 24, "add_qkv_bias": True}},
    "dropout": {"model": {"attention_dropout": 0.2, "hidden_dropout": 0.2}},
    "dropout_selective": {
        "model": {"attention_dropout": 0.2, "hidden_dropout": 0.2},
        "train": {"recompute_granularity": "selective"},
    },
    "dropout_full": {
        "model": {"attention_dropout": 0.2, "hidden_dropout": 0.2},
        "train": {"recompute_granularity": "full"},
    },
    "bf16": {"train": {"precision": "bf16"}, "parallel": {"zero_stage": 1}},
}
WINDOW = LoopPlan(4, ((1, LayerPlan(2, (0, 3))), (3, LayerPlan(1, (1, 2), 0.5))))


def build(config: Config, plain: bool = False) -> LanguageModel:
    precision = "bf16" if config.train.precision == "bf16" else "fp32"
    return build_model(config, single_groups(config), precision, 3, plain).train()


def train(model: LanguageModel, config: Config, steps: int = 3) -> list[Tensor]:
    """Losses and gradients of every step, and the weights in the end."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    record = []
    for seed in range(steps):
        optimizer.zero_grad()
        loss = model(**random_batch(config, seed))
        loss.backward()
        record += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
    return record + [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_empty_plan_is_megatron_core(variant: str, entropy: bool) -> None:
    config = small_config(**VARIANTS[variant])
    plain = build(config, plain=True)
    assert not sgt_layers(plain)
    assert sum(type(m) is TransformerLayer for m in plain.modules()) == 4
    wanted = train(plain, config)
    model = build(config)
    assert [type(layer) for layer in sgt_layers(model)] == [SGTLayer] * 4
    model.meter.enabled = entropy
    found = train(model, config)
    parameters = len(list(plain.parameters()))
    assert len(found) == len(wanted) == 3 * (1 + parameters) + parameters
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("variant", ["multi_head", "dropout"])
def test_a_plan_taken_back_leaves_nothing(variant: str) -> None:
    """After growing and shrinking, the layers are Megatron-Core's again; grown, they are not."""
    config = small_config(**VARIANTS[variant])
    wanted = train(build(config, plain=True), config)
    for plan, same in ((WINDOW, False), (LoopPlan.empty(4), True)):
        model = build(config)
        apply_plan(model, WINDOW)
        apply_plan(model, plan)
        found = train(model, config)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True)) is same


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_loops_train_the_same_weights(dropout: float, recompute: str) -> None:
    """Bit for bit: gates, passes and dropout masks are the same when activations are computed again."""

    def run(granularity: str) -> list[Tensor]:
        config = small_config(
            model={"attention_dropout": dropout, "hidden_dropout": dropout},
            train={"recompute_granularity": granularity},
        )
        model = build(config)
        apply_plan(model, WINDOW)
        return train(model, config)

    assert all(torch.equal(a, b) for a, b in zip(run(recompute), run("none"), strict=True))


@pytest.mark.parametrize("loops", [0, 1])
def test_block_loop_equals_the_reference(loops: int) -> None:
    """The whole layer again, with head loops in it or without."""
    config = small_config(model={"num_query_groups": 2})
    model = single_model(config).train()
    make_weights_uneven(model)
    params = leaves(hf_of(model, config))
    tokens = random_batch(config)["tokens"]
    kept = (0, 2) if loops else ()
    apply_plan(model, LoopPlan(4, ((1, LayerPlan(loops, kept, block_loops=2)), (2, LayerPlan(block_loops=1)))))
    gates = torch.tensor([[1.0, 0.0, 1.0, 0.0]] * 4)
    wanted, _ = forward(params, tokens, reference_settings(config), [0, loops, 0, 0], gates, {1: 2, 2: 1})
    found = model.gpt(tokens, torch.arange(32).expand(2, -1), None)[..., : config.model.vocab_size]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
    found.square().mean().backward()
    wanted.square().mean().backward()
    wanted_grads = {name: p.grad for name, p in params.items() if p.grad is not None}
    scale = max(float(grad.abs().max()) for grad in wanted_grads.values())
    assert largest_difference(hf_of(model, config, grads=True), wanted_grads) < 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_sub_net_is_the_model_that_has_only_its_layers(recompute: str) -> None:
    """Loss, gradients and looping of layers 0 and 2 of 4; the others get no gradient."""
    sections = {"growth": {"method": "vanilla"}, "train": {"recompute_granularity": recompute}}
    whole = single_model(small_config(**sections)).train()
    make_weights_uneven(whole)
    small = single_model(small_config(**sections, model={"num_layers": 2})).train()
    names = {name: name.replace("layers.1.", "layers.2.") for name, _ in small.named_parameters()}
    theirs = dict(whole.named_parameters())
    with torch.no_grad():
        for name, parameter in small.named_parameters():
            parameter.copy_(theirs[names[name]])
    looping = LayerPlan(1, (0, 2))
    apply_plan(whole, LoopPlan(4, ((2, looping), (3, looping))).skipping({1, 3}))
    apply_plan(small, LoopPlan(2, ((1, looping),)))
    batch = random_batch(small_config())
    losses = [model(**batch) for model in (whole, small)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=0, atol=1e-6)
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(theirs.pop(names[name]).grad, parameter.grad, rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in theirs.values()) and len(theirs) == 2 * 6


def test_hidden_dropout_acts_on_the_branch_of_a_loop() -> None:
    layer = sgt_layers(build(small_config(model={"hidden_dropout": 0.5})))[0]
    bias, residual = torch.full((64,), 0.5), torch.full((64, 2, 64), 7.0)

    def combined(bias: Tensor | None) -> list[float]:
        out = layer.add_residual((torch.ones(64, 2, 64), bias), residual)
        return sorted(set(out.flatten().tolist()))

    layer.train()
    assert combined(bias) == [7.0, 10.0]
    assert combined(None) == [7.0, 9.0]
    layer.eval()
    assert combined(bias) == [8.5]
    assert combined(None) == [8.0]
    assert torch.equal(residual, torch.full((64, 2, 64), 7.0))


def test_layers_count_from_0() -> None:
    layers = sgt_layers(single_model(small_config()))
    assert [layer.layer_id for layer in layers] == [0, 1, 2, 3]
    assert [layer.layer_number for layer in layers] == [1, 2, 3, 4]
    assert [layer.self_attention.core_attention.layer_id for layer in layers] == [0, 1, 2, 3]


def test_an_equal_plan_costs_nothing() -> None:
    """Index tensors are made when the plan changes, not at every step."""
    model = single_model(small_config())
    layer = sgt_layers(model)[1]
    apply_plan(model, LoopPlan(4, ((1, LayerPlan(1, (0, 1))),)))
    loop_pass = layer.loop_pass
    apply_plan(model, LoopPlan(4, ((1, LayerPlan(1, (0, 1))),)))
    assert loop_pass is not None and layer.loop_pass is loop_pass
    apply_plan(model, LoopPlan(4, ((1, LayerPlan(1, (0, 2))),)))
    assert isinstance(layer.loop_pass, SparseLoop) and layer.loop_pass.blocks.ids.tolist() == [0, 2]
    apply_plan(model, LoopPlan.empty(4))
    assert layer.loop_pass is None
