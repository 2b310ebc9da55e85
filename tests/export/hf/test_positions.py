"""Rotary scaling and sliding windows of a config.json: read as either version of transformers has them, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.architecture import TokenIds, hf_config
from megatron_sgt.export.hf.families import HFModel, read_model
from megatron_sgt.growth import LoopPlan
from tests.helpers.hf_folders import LLAMA3, SCALED, SHAPE, build_hf_model


def read(folder: Path, **values: Any) -> HFModel:
    """A model of a config.json as it lies on a hub, not as transformers would save it."""
    (folder / "config.json").write_text(json.dumps({**SHAPE, "model_type": "llama", "rope_theta": 1e4, **values}))
    return read_model(folder)


@pytest.mark.parametrize("name", SCALED)
def test_a_scaling_comes_in_and_goes_out(name: str, tmp_path: Path) -> None:
    """As this version of transformers saves it; and what is exported turns heads in it as the original does."""
    original = build_hf_model(name)
    original.config.save_pretrained(tmp_path)
    fields = ModelConfig.model_validate({**read_model(tmp_path).fields, "seq_length": 16})
    (tmp_path / "config.json").write_text(json.dumps(hf_config(fields, LoopPlan.empty(3), 96, "fp32", TokenIds())))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.model_type, config.max_position_embeddings) == (original.config.model_type, 64)
    again = transformers.AutoModelForCausalLM.from_config(config)
    positions = torch.tensor([[0, 1, 15, 16, 17, 63, 64, 500]])
    rotary = [model.model.rotary_emb(torch.ones(1), positions) for model in (original, again)]
    assert all(torch.equal(found, wanted) for found, wanted in zip(*rotary, strict=True))
    assert read_model(tmp_path).fields == fields.model_dump(include=set(read_model(tmp_path).fields)) | {
        "rotary_scaling": fields.model_dump(exclude_none=True)["rotary_scaling"]
    }


def test_what_older_files_leave_out_is_filled_in(tmp_path: Path) -> None:
    """``type`` in place of ``rope_type``, whole numbers, no context before the scaling."""
    scaling = {"type": "yarn", "factor": 4, "finetuned": True}
    assert read(tmp_path, rope_scaling=scaling).fields["rotary_scaling"] == {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "context_length": 64,
    }  # fmt: skip


def test_the_files_of_llama(tmp_path: Path) -> None:
    """As Llama 3.1 and 3.2 have them: what they name as context is not factor times the original."""
    for factor in (8.0, 32.0):
        scaling = {**LLAMA3, "factor": factor, "original_max_position_embeddings": 8192}
        found = read(tmp_path, rope_theta=5e5, rope_scaling=scaling, max_position_embeddings=131072)
        fields = ModelConfig.model_validate({**found.fields, "seq_length": 4096})
        config = hf_config(fields, LoopPlan.empty(3), 96, "bf16", TokenIds())
        assert config["rope_scaling"] == scaling and config["max_position_embeddings"] == 131072
        assert config["rope_parameters"] == {**scaling, "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic': its frequencies depend on the length"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4,
                           "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}},
         "'longrope': it has two sets of frequencies"),
        ({"rope_scaling": {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 16, "high_freq_factor": 1.0}},
         "'llama3': high_freq_factor: must be > low_freq_factor 1, got 1"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "'linear': factor: must be >= 1, got 0.5"),
        ({"rope_scaling": {"type": "mine", "factor": 2.0}}, "'mine': known are linear, llama3, yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types chunked_attention"),
        ({"model_type": "mistral", "sliding_window": 1}, "sliding_window 1"),
    ],
)  # fmt: skip
def test_positions_that_no_run_has_are_named(values: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        read(tmp_path, **values)
    assert says in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, 32),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "llama"}, None),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}, 16),
        ({"model_type": "qwen3", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}, None),
    ],
)
def test_windows_bound_the_context_where_a_layer_slides(
    values: dict[str, Any], window: int | None, tmp_path: Path
) -> None:
    found = read(tmp_path, **values)
    assert found.window == window
    assert found.window_problem(16) is None and bool(found.window_problem(33)) == (window is not None)
