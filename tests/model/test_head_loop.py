"""The loop in both its forms, against each other and against the reference that shares no code with them."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.apply_plan import apply_plan, sgt_layers
from megatron_sgt.model.gpt import LanguageModel
from megatron_sgt.model.head_loop import SparseLoop
from megatron_sgt.ops.head_blocks import head_blocks
from megatron_sgt.ops.rotary import rotary_table
from tests.helpers.fake_groups import fake_groups
from tests.helpers.reference_sgt import forward, next_token_loss
from tests.helpers.single import random_batch, single_model, small_config
from tests.helpers.tensor_shapes import ShapeRecorder
from tests.helpers.variants import (
    MODEL_VARIANTS,
    hf_of,
    largest_difference,
    leaves,
    make_weights_uneven,
    reference_settings,
)

# With two groups, heads 0 and 1 share one, 2 and 3 the other.
KEPT = {"shared": (0, 1), "unshared": (1, 2), "uneven": (0, 1, 3), "one": (2,), "all": (0, 1, 2, 3)}
# So small that a gated head adds less than fp32 can see, and yet above 0: the dense form runs.
ALMOST_ZERO = 1e-30


def built(variant: str, depth: int) -> tuple[Config, LanguageModel]:
    config = small_config(model=MODEL_VARIANTS[variant], growth={"max_loop_depth": depth})
    model = single_model(config)
    make_weights_uneven(model)
    return config, model


def plan_of(depth: int, kept: tuple[int, ...], gate: float) -> LoopPlan:
    """Layer 1 and the last layer loop."""
    other = 0.0 if len(kept) == 4 else gate
    return LoopPlan(4, tuple((n, LayerPlan(depth, kept, other)) for n in (1, 3)))


def measure(model: LanguageModel, config: Config, plan: LoopPlan) -> tuple[Tensor, dict[str, Tensor], Any]:
    """Loss, gradients under Hugging Face names and the entropy table of one micro-batch."""
    model.train()
    apply_plan(model, plan)
    model.zero_grad()
    model.meter.enabled = True
    batch = random_batch(config)
    # The reference's loss: the last position has no label.
    batch["labels"] = batch["tokens"].roll(-1, dims=1)
    batch["loss_mask"][:, -1] = 0.0
    loss = model(**batch)
    loss.backward()
    model.meter.end_micro_batch()
    return loss.detach(), hf_of(model, config, grads=True), model.meter.reduce(fake_groups())


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("variant", MODEL_VARIANTS)
def test_dense_loop_with_vanishing_gates_equals_sparse_loop(variant: str, kept: str, depth: int) -> None:
    config, model = built(variant, depth)
    sparse_loss, sparse, sparse_entropy = measure(model, config, plan_of(depth, KEPT[kept], 0.0))
    dense_loss, dense, dense_entropy = measure(model, config, plan_of(depth, KEPT[kept], ALMOST_ZERO))
    assert dense_loss.item() == pytest.approx(sparse_loss.item(), abs=1e-6)
    scale = max(float(grad.abs().max()) for grad in sparse.values())
    assert largest_difference(dense, sparse) < 1e-6 * max(1.0, scale)
    # The sparse form measures its own heads, and leaves the others' cells at 0.
    own = dense_entropy.copy()
    own[:, 1:, [head for head in range(4) if head not in KEPT[kept]]] = 0.0
    assert abs(sparse_entropy - own).max() < 1e-6
    assert (sparse_entropy[[1, 3]][:, 1 : depth + 1][:, :, list(KEPT[kept])] > 0).all()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("gate", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("variant", MODEL_VARIANTS)
def test_equals_the_reference(variant: str, gate: float, depth: int) -> None:
    """Logits, loss, all gradients and entropies, with one depth per layer and overlapping windows."""
    config, model = built(variant, depth)
    layers = {1: LayerPlan(1, (0, 3), 0.5 * gate), 3: LayerPlan(depth, (0, 1), gate)}
    plan = LoopPlan(4, tuple(layers.items()))
    loops, gates = [0] * 4, torch.zeros(4, 4)
    for n, layer in layers.items():
        loops[n] = layer.loops
        gates[n] = torch.tensor([1.0 if head in layer.kept_heads else layer.other_gate for head in range(4)])
    params = leaves(hf_of(model, config))
    tokens = random_batch(config)["tokens"]
    logits, entropies = forward(params, tokens, reference_settings(config), loops, gates, {})
    wanted_loss = next_token_loss(logits, tokens)
    wanted_loss.backward()

    loss, grads, table = measure(model, config, plan)
    assert loss.item() == pytest.approx(wanted_loss.item(), abs=2e-6)
    wanted = {name: p.grad for name, p in params.items() if p.grad is not None}
    assert wanted.keys() == params.keys()
    scale = max(float(grad.abs().max()) for grad in wanted.values())
    assert largest_difference(grads, wanted) < 1e-5 * max(1.0, scale)
    for n, passes in enumerate(entropies):
        for index, entropy in enumerate(passes):
            measured = gate > 0 or index == 0
            heads = list(range(4)) if measured else list(layers[n].kept_heads)
            assert table[n, index, heads] == pytest.approx(entropy[heads].numpy(), abs=2e-6)
    model.eval()
    torch.testing.assert_close(
        model.logits(tokens)[..., : config.model.vocab_size], logits.detach(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_no_tensor_of_a_training_step_is_sequence_by_sequence(groups: int, recompute: str) -> None:
    length = 47  # a prime, of which no other size is a multiple
    config = small_config(
        model={"seq_length": length, "num_query_groups": groups}, train={"recompute_granularity": recompute}
    )
    model = single_model(config).train()
    apply_plan(model, LoopPlan(4, ((1, LayerPlan(2, (0, 1, 3))), (2, LayerPlan(1, (0, 2), 0.5)))))
    model.meter.enabled = True
    with ShapeRecorder() as recorder:
        model(**random_batch(config)).backward()
        model.meter.end_micro_batch()
    assert recorder.count > 500
    assert any(length in shape for _, shape in recorder.shapes)
    assert not recorder.with_twice(length)


@pytest.mark.parametrize("variant", ["multi_head", "biases", "qk_norm"])
def test_a_rank_without_kept_heads_still_takes_part(variant: str) -> None:
    """Its part of the sum is zero, yet connected to all that its peers reduce in the backward pass."""
    _, model = built(variant, 1)
    layer = sgt_layers(model)[2]
    blocks = head_blocks(HeadLayout(4, 4, 16, tp_size=2, tp_rank=1), (0, 1))
    x = torch.randn(8, 2, 64, requires_grad=True)
    rotary = rotary_table(torch.zeros(8, 1, 1, 16))
    out = SparseLoop(blocks, kernels=False)(layer, x, rotary, 1)
    bias = layer.self_attention.linear_proj.bias
    torch.testing.assert_close(out, x if bias is None else x + bias)
    model.zero_grad()
    out.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones_like(x))
    norms = [layer.input_layernorm]
    if variant == "qk_norm":
        norms += [layer.self_attention.q_layernorm, layer.self_attention.k_layernorm]
    for norm in norms:
        assert torch.equal(norm.weight.grad, torch.zeros_like(norm.weight))


def test_loops_change_the_model() -> None:
    """What the comparisons above would miss if every loop were a no-op."""
    config, model = built("multi_head", 2)
    losses = {
        plan: measure(model, config, plan)[0].item()
        for plan in (
            LoopPlan.empty(4),
            plan_of(1, (0, 1), 0.0),
            plan_of(2, (0, 1), 0.0),
            plan_of(1, (0, 1), 0.5),
        )
    }
    values = sorted(losses.values())
    assert min(b - a for a, b in pairwise(values)) > 1e-4
