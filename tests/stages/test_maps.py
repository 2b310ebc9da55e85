"""Every tensor of a grown model against slices in plain PyTorch; the function and the gradients in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megatron_sgt import extensions
from megatron_sgt.arch.ffn import FFNKind
from megatron_sgt.arch.weight import Weight, linear
from megatron_sgt.arch.weights import weights
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.model.initial_weights import initial_value
from megatron_sgt.stages.growth import Growth, resized
from megatron_sgt.stages.maps import has_new_entries, maps_of
from megatron_sgt.stages.operators import OPERATORS
from tests.helpers.growing import Params, gap, grown, logits, random_params, shape
from tests.helpers.reference_growth import in_order, split_units, wider
from tests.helpers.reference_sgt import next_token_loss

EXACT = 1e-12
MODELS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped_qk_norm": {"num_query_groups": 2, "qk_layernorm": True},
    "tied_biases": {"untie_embeddings_and_output_weights": False, "add_bias_linear": True},
    "qkv_bias_qk_norm": {"add_qkv_bias": True, "qk_layernorm": True},
    "output_norms": {"norm_position": "output", "qk_layernorm": True, "add_bias_linear": True},
    "olmo2": {"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all"},
}
NO_MORE_HEADS = "olmo2"
"""Its norms of queries and keys are over all heads."""
SIZES: dict[str, dict[str, int]] = {
    "hidden": {"hidden_size": 31},
    "ffn": {"ffn_hidden_size": 27},
    "heads": {"num_attention_heads": 6},
    "layers": {"num_layers": 5},
    "all": {"hidden_size": 31, "ffn_hidden_size": 27, "num_attention_heads": 8, "num_layers": 5},
}


def msg(model: ModelConfig, **sizes: int) -> Growth:
    return OPERATORS["msg"](model, sizes)


def initial(model: ModelConfig) -> Params:
    """The initial values of new entries in the helper's growths."""
    cpu = torch.device("cpu")
    return {n: initial_value(w, n, model, 5, cpu, stage=1).double() for w in weights(model) for n in w.whole}


def gradients(params: Params, model: ModelConfig) -> Params:
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in params.items()}
    tokens = torch.arange(2 * model.seq_length).view(2, -1) * 5 % (model.vocab_size or 1)
    next_token_loss(logits(leaves, model, tokens), tokens).backward()
    return {name: tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("g_stack", {"factor": 2}, [0, 1, 2, 0, 1, 2]),
        ("midas", {"block_size": 1}, [0, 1, 1, 2]),
        ("auto_prog", {"num_layers": 5}, [0, 1, 1, 2, 2]),
    ],
)
def test_copied_layers_are_bit_equal(name: str, options: dict[str, int], order: list[int]) -> None:
    model = shape(qk_layernorm=True, add_bias_linear=True)
    params, growth = random_params(model), OPERATORS[name](model, options)
    new = grown(growth, params)
    expected = in_order(params, order)
    assert new.keys() == expected.keys() and all(torch.equal(new[n], expected[n]) for n in new)
    assert not has_new_entries(maps_of(growth))


def test_a_stack_of_stacks_computes_the_stack_twice() -> None:
    model = shape()
    params = random_params(model)
    growth = OPERATORS["g_stack"](model, {"factor": 2})
    twice = in_order(params, [0, 1, 2, 0, 1, 2])
    assert torch.equal(logits(grown(growth, params), growth.new), logits(twice, growth.new))
    assert float((logits(twice, growth.new) - logits(params, model)).abs().max()) > 0.1, "it is another function"


@pytest.mark.parametrize(
    ("sizes", "kind"), [(s, k) for s in SIZES for k in MODELS if k != NO_MORE_HEADS or s not in ("heads", "all")]
)
def test_widening_preserves_the_function(sizes: str, kind: str) -> None:
    model = shape(**MODELS[kind])
    params, growth = random_params(model), msg(model, **SIZES[sizes])
    new = grown(growth, params)
    assert float((logits(new, growth.new) - logits(params, model)).abs().max()) <= EXACT
    heads = growth.new.num_query_groups, growth.new.num_attention_heads // growth.new.num_query_groups
    widths = growth.new.hidden_size, growth.new.ffn_hidden_size
    expected = in_order(params, [0, 1, 2, 0, 1][: growth.new.num_layers])
    expected = wider(expected, *widths, initial(growth.new), 6, heads) if sizes != "layers" else expected
    for name, tensor in expected.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        outputs = ("post_attention_layernorm", "post_feedforward_layernorm")
        silent = outputs if model.norm_position == "output" else ("o_proj", "down_proj")
        if layer > 2 and any(part in name for part in silent):
            expected[name] = torch.zeros_like(tensor)
    assert gap(new, expected) == 0.0


def test_norms_over_all_heads_keep_their_heads() -> None:
    growth = msg(shape(**MODELS[NO_MORE_HEADS]), num_attention_heads=6)
    with pytest.raises(
        ConfigError, match=r"q_norm\.weight normalises over num_attention_heads, which cannot grow then; grow"
    ):
        maps_of(growth)


def test_members_of_a_group_can_come_between_heads() -> None:
    model = shape(num_query_groups=2, qk_layernorm=True)
    growth = msg(model, num_attention_heads=6, num_query_groups=2)
    params = random_params(model)
    new = grown(growth, params)
    assert float((logits(new, growth.new) - logits(params, model)).abs().max()) <= EXACT
    q, old = (p["model.layers.0.self_attn.q_proj.weight"].view(-1, 6, 24) for p in (new, params))
    assert torch.equal(q[[0, 1, 3, 4]], old)


def test_without_the_rules_of_the_norm_the_function_changes() -> None:
    model = shape()
    params, growth = random_params(model), msg(model, hidden_size=31)
    expected, new = logits(params, model), grown(growth, params)
    kept_epsilon = resized(growth.new, layernorm_epsilon=model.layernorm_epsilon)
    assert float((logits(new, kept_epsilon) - expected).abs().max()) > 1e-5
    root = (24 / 31) ** 0.5
    unscaled = {n: t / root if "norm" in n else t for n, t in new.items()}
    assert float((logits(unscaled, growth.new) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("how", ["msg", "compound_grow"])
def test_gradients_of_copies_are_in_the_proportion_that_moments_get(how: str, kind: str) -> None:
    model = shape(**MODELS[kind])
    options = {"factor": 3, "noise": 0.0} if how == "compound_grow" else dict(SIZES["all"])
    if how == "msg":
        options |= {"num_layers": 3} | ({"num_attention_heads": 4} if kind == NO_MORE_HEADS else {})
    growth, params = OPERATORS[how](model, options), random_params(model)
    before, after = gradients(params, model), gradients(grown(growth, params), growth.new)
    for one in maps_of(growth).values():
        for mapped in one.tensors:
            expected, found = before[mapped.source], after[mapped.name]
            for axis, entries in enumerate(mapped.axes):
                if entries is not None:
                    copied = torch.from_numpy((entries.index >= 0).nonzero()[0])
                    found = found.index_select(axis, copied)
                    expected = expected.index_select(axis, torch.from_numpy(entries.index)[copied])
                    factor = torch.from_numpy(entries.gradient)[copied]
                    expected = expected * factor.view(-1, *[1] * (found.dim() - axis - 1))
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_split_units_preserve_the_function_and_are_told_apart_by_noise() -> None:
    model = shape()
    params = random_params(model)
    plain, noisy = (OPERATORS["compound_grow"](model, {"factor": 2, "noise": noise}) for noise in (0.0, 0.2))
    assert gap(grown(plain, params), split_units(params, 2)) == 0.0
    for growth in (plain, noisy):
        new = grown(growth, params)
        assert float((logits(new, growth.new) - logits(params, model)).abs().max()) <= EXACT
        gate, down = (gradients(new, growth.new)[f"model.layers.1.mlp.{n}_proj.weight"] for n in ("gate", "down"))
        direction = torch.nn.functional.cosine_similarity(gate[:20], gate[20:], dim=1)
        same = bool((direction > 1 - 1e-9).all())
        assert same is (growth is plain), "Adam sees the direction of a gradient, not its size"
        assert torch.allclose(down[:, :20], down[:, 20:], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("how", ["msg", "compound_grow", "g_stack"])
def test_every_new_weight_has_changed_after_three_steps(how: str) -> None:
    model = shape(layernorm_epsilon=1e-6)
    options = SIZES["all"] if how == "msg" else {"factor": 2}
    growth, params = OPERATORS[how](model, options), random_params(model)
    start = grown(growth, params)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-3, weight_decay=0.0)
    tokens = torch.arange(32 * 12).view(32, -1) % 29  # every token of the vocabulary
    for _ in range(3):
        optimizer.zero_grad()
        next_token_loss(logits(leaves, growth.new, tokens), tokens).backward()
        optimizer.step()
    still = [name for name in start if bool((leaves[name] == start[name]).any())]
    assert still == []


def test_gate_up_and_down_all_zero_never_train() -> None:
    model = shape()
    growth = msg(model, ffn_hidden_size=27)
    params = random_params(model)
    new = grown(growth, params)
    for name in new:
        if "gate_proj" in name or "up_proj" in name:
            new[name][20:] = 0
    assert float((logits(new, growth.new) - logits(params, model)).abs().max()) <= EXACT, "yet it preserves"
    found = gradients(new, growth.new)
    for layer in range(3):
        gate, up, down = (found[f"model.layers.{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        assert not gate[20:].any() and not up[20:].any() and not down[:, 20:].any()
    alive = gradients(grown(growth, params), growth.new)
    assert bool((alive["model.layers.1.mlp.down_proj.weight"][:, 20:] != 0).all())


class TwoBranches(FFNKind):
    """A kind that the package does not know: a(x) · b(x) written by one matrix, c(x) by another."""

    def weights(self, model: ModelConfig, layer: int) -> Iterator[Weight]:
        hidden, width = model.hidden_size, model.ffn_hidden_size
        for name, rows in (("first", ("a", "b")), ("second", ("c",))):
            megatron, hf = f"decoder.layers.{layer}.mlp.{name}", f"model.layers.{layer}.mlp"
            yield from linear(f"{megatron}_in", {f"{hf}.{r}": (width, hidden) for r in rows}, "rows", "mlp", bias=True)
            yield from linear(f"{megatron}_out", {f"{hf}.{name}": (hidden, width)}, "columns", "mlp")


class Rounded(FFNKind):
    """A kind whose width is no multiple of the size that is set."""

    def weights(self, model: ModelConfig, layer: int) -> Iterator[Weight]:
        width = model.ffn_hidden_size // 2 + 1
        rows = {f"model.layers.{layer}.mlp.up": (width, model.hidden_size)}
        yield from linear(f"decoder.layers.{layer}.mlp.up", rows, "rows", "mlp")


@pytest.fixture
def other_kinds() -> Iterator[None]:
    extensions.register("ffn", "two_branches", TwoBranches("x:y", gated=True, hidden_act=None, saved=3))
    extensions.register("ffn", "rounded", Rounded("x:y", gated=False, hidden_act=None, saved=3))
    yield
    extensions.unregister("ffn", "two_branches")
    extensions.unregister("ffn", "rounded")


@pytest.mark.usefixtures("other_kinds")
def test_another_kind_of_layer_needs_no_line() -> None:
    model = shape(activation="two_branches")
    params = random_params(model)
    new = grown(msg(model, ffn_hidden_size=22, num_layers=4), params)
    for name in ("a", "b", "c"):
        found = new[f"model.layers.1.mlp.{name}.weight"]
        assert torch.equal(found[:20], params[f"model.layers.1.mlp.{name}.weight"]) and bool(found[20:].all())
    for name in ("first", "second"):
        found = new[f"model.layers.1.mlp.{name}.weight"]
        assert torch.equal(found[:, :20], params[f"model.layers.1.mlp.{name}.weight"]) and not found[:, 20:].any()
        assert not new[f"model.layers.3.mlp.{name}.weight"].any(), "a new layer writes nothing"
    halves = grown(OPERATORS["compound_grow"](model, {"factor": 2, "noise": 0.0}), params)
    assert torch.equal(halves["model.layers.0.mlp.first.weight"][:, 20:], params["model.layers.0.mlp.first.weight"] / 2)


@pytest.mark.usefixtures("other_kinds")
def test_a_kind_whose_units_cannot_be_found_does_not_grow_wider() -> None:
    model = shape(activation="rounded")
    grown(OPERATORS["g_stack"](model, {"factor": 2}), random_params(model))
    with pytest.raises(ConfigError, match=r"mlp.up.weight: it is not clear .* unit of rounded"):
        maps_of(msg(model, ffn_hidden_size=22))


def test_copies_share_the_maps_of_their_axes() -> None:
    made = maps_of(msg(shape(num_layers=8), hidden_size=31))
    axes = {id(axis) for one in made.values() for mapped in one.tensors for axis in mapped.axes if axis is not None}
    assert len(axes) == 3, "written, read, normalised"
