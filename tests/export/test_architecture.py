"""Which architecture a model becomes, and what its configuration says."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.config.model import ModelConfig
from megatron_sgt.export.architecture import TokenIds, generation_config, hf_config, plain_architecture
from megatron_sgt.growth import LayerPlan, LoopPlan
from tests.helpers.single import SMALL

EMPTY = LoopPlan.empty(4)


def model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**SMALL["model"], **changes})


@pytest.mark.parametrize(
    ("changes", "architecture"),
    [
        ({}, "LlamaForCausalLM"),
        ({"num_query_groups": 2, "untie_embeddings_and_output_weights": False}, "LlamaForCausalLM"),
        ({"add_bias_linear": True}, "LlamaForCausalLM"),
        ({"add_qkv_bias": True}, "Qwen2ForCausalLM"),
        ({"qk_layernorm": True}, "Qwen3ForCausalLM"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, None),
        ({"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all"}, "Olmo2ForCausalLM"),
        ({"norm_position": "output", "qk_layernorm": True}, None),
        ({"qk_layernorm": True, "qk_layernorm_over": "all"}, None),
        ({"normalization": "LayerNorm"}, None),
        ({"activation": "gelu"}, None),
        ({"num_attention_heads": 5, "kv_channels": 12}, None),
    ],
)
def test_never_grown_models_are_plain_where_one_is_the_same_function(
    changes: dict[str, Any], architecture: str | None
) -> None:
    found, why = plain_architecture(model(**changes), EMPTY)
    assert found == architecture and why
    config = hf_config(model(**changes), EMPTY, 128, "bf16", TokenIds())
    assert config["architectures"] == [architecture or "SGTForCausalLM"]
    assert ("auto_map" in config) == (architecture is None)


def test_grown_models_say_how_they_loop() -> None:
    plan = LoopPlan(4, ((3, LayerPlan(2, (1, 3))), (2, LayerPlan(1, (0,), 0.25)), (1, LayerPlan(block_loops=2))))
    config = hf_config(model(), plan, 120, "fp16", TokenIds(1, 2, 0))
    assert config["sgt_loops"] == {
        "1": {"heads": [], "depth": 0, "block_loops": 2},
        "2": {"heads": [0], "depth": 1, "other_gate": 0.25},
        "3": {"heads": [1, 3], "depth": 2},
    }
    assert (config["vocab_size"], config["torch_dtype"], config["eos_token_id"]) == (120, "float16", 2)
    assert config["pad_token_id"] is None, "it would stop the training of that token's embedding"
    assert plain_architecture(model(), plan)[1] == "it loops in layers 1, 2, 3"


def test_a_qwen2_folder_has_a_tokenizer_of_its_kind() -> None:
    found, why = plain_architecture(model(add_qkv_bias=True), EMPTY, like_qwen=False)
    assert found is None and "beside a Qwen2 model" in why
    config = hf_config(model(add_qkv_bias=True), EMPTY, 128, "bf16", TokenIds(), like_qwen=False)
    assert config["model_type"] == "sgt" and config["sgt_loops"] == {}


def test_generation_never_writes_padding_rows() -> None:
    assert generation_config(TokenIds(1, 2, None), range(5, 5)) == {"bos_token_id": 2, "eos_token_id": 2}
    assert generation_config(TokenIds(1, None, None), range(5, 5)) == {"bos_token_id": 1}
    assert generation_config(TokenIds(1, 2, None, begin=1), range(5, 5)) == {"bos_token_id": 1, "eos_token_id": 2}
    assert generation_config(TokenIds(), range(5, 7)) == {"suppress_tokens": [5, 6]}
