"""Megatron shards from Hugging Face tensors and back: bit for bit, for every layout; what does not fit is named."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.arch.weights import weights
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.model.hf_weights import hf_weights, megatron_shard

BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 8,
    "ffn_hidden_size": 24,
    "seq_length": 8,
    "vocab_size": 100,
    "make_vocab_size_divisible_by": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped_query": {"num_query_groups": 4},
    "biases": {"add_bias_linear": True, "num_query_groups": 4},
    "qkv_bias": {"add_qkv_bias": True},
    "qk_norm_wide_heads": {"qk_layernorm": True, "kv_channels": 6, "num_query_groups": 4},
    "olmo2": {"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all", "num_query_groups": 4},
    "tied": {"untie_embeddings_and_output_weights": False},
    "gelu_layer_norm": {"activation": "gelu", "normalization": "LayerNorm", "add_bias_linear": True},
    "vocabulary_fits": {"vocab_size": 128},
}


def model_of(variant: str) -> ModelConfig:
    return ModelConfig.model_validate({**BASE, **VARIANTS[variant]})


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names and shapes, written out here once more."""
    hidden, ffn, size = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    queries, keys = model.num_attention_heads * size, model.num_query_groups * size
    assert model.vocab_size is not None
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (model.vocab_size, hidden)}
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }
    if model.activation == "swiglu":
        linears["mlp.gate_proj"] = (ffn, hidden)
    other = "post_feedforward" if model.norm_position == "output" else "input"
    norms = {f"{other}_layernorm": hidden, "post_attention_layernorm": hidden}
    for n in range(model.num_layers):
        for name, shape in linears.items():
            shapes[f"model.layers.{n}.{name}.weight"] = shape
            qkv = name[-6] in "qkv" and "self_attn" in name
            if model.add_bias_linear or (model.add_qkv_bias and qkv):
                shapes[f"model.layers.{n}.{name}.bias"] = shape[:1]
        for name, width in norms.items():
            shapes[f"model.layers.{n}.{name}.weight"] = (width,)
            if model.normalization == "LayerNorm":
                shapes[f"model.layers.{n}.{name}.bias"] = (width,)
        if model.qk_layernorm:
            widths = (queries, keys) if model.qk_layernorm_over == "all" else (size, size)
            norm_shapes = zip("qk", widths, strict=True)
            shapes |= {f"model.layers.{n}.self_attn.{x}_norm.weight": (width,) for x, width in norm_shapes}
    shapes["model.norm.weight"] = (hidden,)
    if model.normalization == "LayerNorm":
        shapes["model.norm.bias"] = (hidden,)
    if model.untie_embeddings_and_output_weights:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    return shapes


def random_weights(model: ModelConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in hf_shapes(model).items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant: str, tp_size: int) -> None:
    model = model_of(variant)
    for dtype in (torch.float32, torch.bfloat16):
        weights = random_weights(model, dtype)
        shards = [megatron_shard(weights, model, tp_size, rank) for rank in range(tp_size)]
        assert same(hf_weights(shards, model), weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_has_the_names_and_shapes_of_hugging_face(variant: str) -> None:
    model = model_of(variant)
    padded = {"model.embed_tokens.weight", "lm_head.weight"}
    wanted = {n: (128, *s[1:]) if n in padded else s for n, s in hf_shapes(model).items()}
    assert {n: s for weight in weights(model) for n, s in weight.whole.items()} == wanted


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_the_fused_projection_is_ordered_by_group(tp_size: int) -> None:
    """Group g of four: query heads 2g and 2g + 1, then key g, then value g, each 4 rows high."""
    model = model_of("grouped_query")
    weights = random_weights(model)
    q, k, v = (weights[f"model.layers.1.self_attn.{x}_proj.weight"].split(4) for x in "qkv")
    blocks = [block for g in range(4) for block in (q[2 * g], q[2 * g + 1], k[g], v[g])]
    wanted = torch.cat(blocks).chunk(tp_size)
    for rank in range(tp_size):
        shard = megatron_shard(weights, model, tp_size, rank)
        assert torch.equal(shard["decoder.layers.1.self_attention.linear_qkv.weight"], wanted[rank])


def test_gate_and_up_are_split_each_for_itself() -> None:
    model = model_of("multi_head")
    weights = random_weights(model)
    gate, up = (weights[f"model.layers.0.mlp.{x}_proj.weight"] for x in ("gate", "up"))
    shard = megatron_shard(weights, model, 2, 1)["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(shard, torch.cat([gate[12:], up[12:]]))


def test_the_vocabulary_is_padded_with_zeros_and_trimmed_again() -> None:
    model = model_of("multi_head")
    weights = random_weights(model)
    shards = [megatron_shard(weights, model, 4, rank) for rank in range(4)]
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole = torch.cat([shard[name] for shard in shards])
        assert whole.shape == (128, 32) and not whole[100:].any() and whole[:100].any(1).all()
        for shard in shards:  # what training may have left in the padding is not exported
            shard[name] = shard[name] + 0.0
        shards[3][name][-28:] = 7.0
    assert same(hf_weights(shards, model), weights)


def test_where_the_padding_counts_as_vocabulary_it_stays() -> None:
    model = model_of("multi_head")
    shards = [megatron_shard(random_weights(model), model, 2, rank) for rank in range(2)]
    whole = model.model_copy(update={"vocab_size": model.padded_vocab_size()})
    assert hf_weights(shards, whole)["lm_head.weight"].shape == (128, 32)


def test_shards_and_results_own_their_memory() -> None:
    """Training in place on a shard must not change the weights it came from, nor the other way round."""
    model = model_of("qk_norm_wide_heads")
    weights = random_weights(model)
    untouched = {name: tensor.clone() for name, tensor in weights.items()}
    shards = [megatron_shard(weights, model, 2, rank) for rank in range(2)]
    result = hf_weights(shards, model)
    for shard in shards:
        for tensor in shard.values():
            tensor.fill_(5.0)
    assert same(weights, untouched)
    assert same(result, untouched)


def without(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {n: t for n, t in weights.items() if n != name}


def test_what_does_not_fit_is_named() -> None:
    model = model_of("multi_head")
    weights = random_weights(model)
    key = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match=rf"lack 1 tensors of this model: {key}"):
        megatron_shard(without(weights, key), model)
    with pytest.raises(CheckpointError, match=r"hold 1 tensors unknown to this model: model\.layers\.2\.x"):
        megatron_shard({**weights, "model.layers.2.x": torch.ones(1)}, model)
    tall = {**weights, "lm_head.weight": torch.ones(129, 32)}
    with pytest.raises(CheckpointError, match=r"shape \[129, 32\], this model's has \[100 to 128, 32\]"):
        megatron_shard(tall, model)
    tied = ModelConfig.model_validate({**BASE, "untie_embeddings_and_output_weights": False})
    with pytest.raises(CheckpointError, match=r"unknown to this model: lm_head.weight"):
        megatron_shard(weights, tied)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_wrong_shape_is_refused(variant: str) -> None:
    """Each tensor of the model in turn; unseen, a projection too tall would hand its rows to its neighbour."""
    model = model_of(variant)
    weights = random_weights(model)
    for name, tensor in weights.items():
        for dim in range(tensor.dim()):
            shape = list(tensor.shape)
            shape[dim] *= 2
            with pytest.raises(CheckpointError) as error:
                megatron_shard({**weights, name: torch.ones(shape)}, model, 2, 1)
            assert str(error.value).startswith(f"{name} has the shape {shape}, this model's has [")


@pytest.mark.parametrize(("rows", "fits"), [(99, False), (100, True), (128, True), (129, False)])
def test_the_vocabulary_may_come_padded(rows: int, fits: bool) -> None:
    model = model_of("multi_head")
    weights = {**random_weights(model), "lm_head.weight": torch.ones(rows, 32)}
    if not fits:
        with pytest.raises(CheckpointError, match=rf"lm_head.weight has the shape \[{rows}, 32\]"):
            megatron_shard(weights, model)
        return
    assert int(megatron_shard(weights, model)["output_layer.weight"].sum()) == rows * 32
