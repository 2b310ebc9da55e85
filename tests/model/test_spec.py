"""The modules in the slots of the decoder."""

from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.model.core_attention import SGTCoreAttention
from megatron_sgt.model.entropy_meter import EntropyMeter
from megatron_sgt.model.layer import SGTLayer
from megatron_sgt.model.loop_pass import LoopOptions
from megatron_sgt.model.norm import HeadNorm, LayerNorm, RMSNorm
from megatron_sgt.model.spec import decoder_spec, layer_submodules
from tests.helpers.single import single_model, small_config

LAYOUT = HeadLayout(4, 4, 16)


def meter() -> EntropyMeter:
    return EntropyMeter(4, 2, LAYOUT, torch.device("cpu"))


@pytest.mark.parametrize("plain", [False, True])
def test_layers_of_the_decoder(plain: bool) -> None:
    spec = decoder_spec(small_config(), meter(), LAYOUT, plain)
    assert len(spec.layer_specs) == 4
    assert {layer.module for layer in spec.layer_specs} == {TransformerLayer if plain else SGTLayer}
    params: dict[str, Any] = {}
    if not plain:
        loops = LoopOptions(LAYOUT, balanced=False, sharded=False, fused=False)
        # One table of rotary angles for all layers.
        tables = spec.layer_specs[0].params["tables"]
        params = {"loop_options": loops, "output_norm": None, "recompute": (), "tables": tables}
    assert all(layer.params == params for layer in spec.layer_specs)
    assert spec.layer_norm is RMSNorm


@pytest.mark.parametrize(
    ("model", "norm", "head_norm"),
    [
        ({}, RMSNorm, None),
        ({"normalization": "LayerNorm"}, LayerNorm, None),
        ({"qk_layernorm": True}, RMSNorm, HeadNorm),
        ({"qk_layernorm": True, "normalization": "LayerNorm"}, LayerNorm, HeadNorm),
    ],
)
def test_norms(model: dict[str, Any], norm: type, head_norm: type | None) -> None:
    config = small_config(model=model)
    parts = layer_submodules(config, meter())
    attention = parts.self_attention.submodules
    assert parts.input_layernorm is parts.pre_mlp_layernorm is norm
    assert attention.q_layernorm is attention.k_layernorm is head_norm
    assert decoder_spec(config, meter(), LAYOUT).layer_norm is norm


def test_norms_of_outputs_and_over_all_heads() -> None:
    model = {"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all", "num_query_groups": 2}
    config = small_config(model=model)
    parts = layer_submodules(config, meter())
    assert parts.input_layernorm is parts.pre_mlp_layernorm is torch.nn.Identity
    assert decoder_spec(config, meter(), LAYOUT).layer_specs[0].params["output_norm"] is RMSNorm
    shapes = {name: tuple(p.shape) for name, p in single_model(config).gpt.decoder.layers[1].named_parameters()}
    assert {name: shape for name, shape in shapes.items() if "norm" in name} == {
        "self_attention.q_layernorm.weight": (64,),
        "self_attention.k_layernorm.weight": (32,),
        "post_attention_layernorm.weight": (64,),
        "post_mlp_layernorm.weight": (64,),
    }


@pytest.mark.parametrize(("granularity", "recompute"), [("none", False), ("selective", True), ("full", False)])
def test_the_attention_core_recomputes_itself(granularity: str, recompute: bool) -> None:
    """Under "full" the whole layer is repeated: a second repetition inside it would be waste."""
    model = single_model(small_config(train={"recompute_granularity": granularity}))
    cores = [m for m in model.modules() if isinstance(m, SGTCoreAttention)]
    assert [core.recompute for core in cores] == [recompute] * 4
    assert all(core.meter is model.meter for core in cores)


@pytest.mark.parametrize("plain", [False, True])
def test_plain_and_sgt_models_have_the_same_parameters(plain: bool) -> None:
    config: Config = small_config(model={"qk_layernorm": True, "add_bias_linear": True})
    names = [name for name, _ in single_model(config, plain).named_parameters()]
    assert names == [name for name, _ in single_model(config).named_parameters()]
    assert "gpt.decoder.layers.3.self_attention.q_layernorm.weight" in names


@pytest.mark.parametrize(
    ("granularity", "layers", "wanted"),
    [("full", None, [True] * 4), ("full", [1, 3], [False, True, False, True]), ("none", None, [False] * 4)],
)
def test_lists_of_recomputed_layers(granularity: str, layers: list[int] | None, wanted: list[bool]) -> None:
    model = single_model(small_config(train={"recompute_granularity": granularity, "recompute_layers": layers}))
    assert [m.recompute for m in model.modules() if isinstance(m, SGTLayer)] == wanted
