"""config.json of every family, read as a model of this project; what does not fit is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from megatron_sgt.export.hf.families import read_model
from tests.helpers.hf_folders import FAMILIES, SHAPE, build_hf_model


def write(folder: Path, values: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def saved(name: str, **settings: Any) -> dict[str, Any]:
    return {**build_hf_model(name).config.to_dict(), **settings}


@pytest.mark.parametrize("name", FAMILIES)
def test_reads_what_transformers_saves(name: str, tmp_path: Path) -> None:
    model = build_hf_model(name)
    model.config.save_pretrained(tmp_path)
    found = read_model(tmp_path)
    fields = ModelConfig.model_validate({**found.fields, "seq_length": 8})
    assert (found.model_type, found.max_position_embeddings) == (model.config.model_type, 64)
    assert (fields.num_layers, fields.hidden_size, fields.ffn_hidden_size, fields.vocab_size) == (
        3,
        32,
        48,
        96,
    )
    assert fields.kv_channels == model.model.layers[0].self_attn.head_dim
    assert fields.layernorm_epsilon == model.config.rms_norm_eps
    assert fields.rotary_base == {"mistral": 1e6, "olmo3": 5e5}.get(name, 1e4)
    assert found.window == (32 if name == "olmo3" else None)
    assert fields.qk_layernorm is (name in ("qwen3", "olmo2", "olmo3"))
    assert fields.norms_all_heads is (fields.norm_position == "output") is (name in ("olmo2", "olmo3"))
    assert (fields.add_bias_linear, fields.add_qkv_bias) == (name == "llama_tied_biased", name == "qwen2")
    assert fields.untie_embeddings_and_output_weights is (name not in ("llama_tied_biased", "qwen3"))


def test_reads_the_names_of_older_versions(tmp_path: Path) -> None:
    """rope_theta and torch_dtype at the top, no head_dim, as transformers 4 wrote them."""
    values = {
        **SHAPE,
        "model_type": "llama",
        "rope_theta": 5e5,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }
    fields = read_model(write(tmp_path, values)).fields
    assert (fields["rotary_base"], fields["kv_channels"]) == (5e5, 8)


def test_reads_an_sgt_model(tmp_path: Path) -> None:
    loops = {"2": {"heads": [0, 3], "depth": 2}}
    SGTConfig(**SHAPE, qk_norm=True, attention_bias=True, sgt_loops=loops).save_pretrained(tmp_path)
    found = read_model(tmp_path)
    assert found.loops == loops and found.fields["qk_layernorm"] and found.fields["add_qkv_bias"]


OF_EACH_KIND = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
}


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"attention_bias": True}, "attention_bias True and mlp_bias False"),
        ("llama", {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantised"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("qwen3", {"attention_bias": True}, "attention_bias True"),
        ("olmo2", {"attention_bias": True}, "attention_bias True: the MLP has none"),
        ("llama", {"model_type": "mixtral"}, "mixture of experts"),
        ("llama", {"model_type": "gpt2"}, "type 'gpt2', which cannot be imported: its positions are learned"),
        ("olmo3", {"rope_parameters": OF_EACH_KIND}, "rotary positions of full_attention and sliding_attention differ"),
        ("llama", {"model_type": "no_such"}, "cannot be used (model_type 'no_such')"),
        ("llama", {"model_type": None}, "names no model_type"),
        ("llama", {"model_type": "sgt", "hidden_act": "gelu"}, "hidden_act 'gelu' with gated_mlp True"),
        ("llama", {"model_type": "sgt", "sgt_loops": {"1": {"heads": [1], "depth": 1, "other_gate": 0.5}}},
         "other_gate 0.5"),
        ("llama", {"model_type": "sgt", "sgt_loops": {"9": {"heads": [1], "depth": 1}}}, "layer 9"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(name: str, settings: dict[str, Any], says: str, tmp_path: Path) -> None:
    values = {key: value for key, value in saved(name, **settings).items() if value is not None}
    with pytest.raises(CheckpointError) as refused:
        read_model(write(tmp_path, values))
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_several_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="hidden_act 'relu'") as refused:
        read_model(write(tmp_path, saved("mistral", sliding_window=1, hidden_act="relu")))
    assert "sliding_window 1" in str(refused.value)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_model(tmp_path)
