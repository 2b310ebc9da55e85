"""Exported folders as transformers loads them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from megatron_sgt.export.hf.loading import load_exported, one_layer_models
from megatron_sgt.export.hf.modeling_sgt import SGTForCausalLM
from tests.helpers.hf_models import hf_model, random_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    SGTConfig.register_for_auto_class()
    SGTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        hf_model("grouped_qk_norm_depth_3").save_pretrained(tmp_path)
    finally:
        SGTConfig._auto_class = SGTForCausalLM._auto_class = None
    return tmp_path


@pytest.mark.parametrize(("dtype", "computed"), [(torch.bfloat16, torch.bfloat16), ("auto", torch.float32)])
def test_in_the_type_that_is_asked_for(folder: Path, dtype: torch.dtype | str, computed: torch.dtype) -> None:
    model = load_exported(folder, dtype, trust=True)
    assert model.dtype == computed and not model.training
    if computed == torch.float32:
        tokens = random_ids(1, 6)
        assert torch.equal(model(tokens).logits, hf_model("grouped_qk_norm_depth_3")(tokens).logits)


def test_code_is_run_only_where_it_is_trusted(folder: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_exported(folder, "auto", trust=False)


def test_single_layers_have_the_loops_of_their_place(folder: Path) -> None:
    build = one_layer_models(folder, trust=True)
    depths = [build(layer).model.layers[0].depth for layer in range(4)]
    assert depths == [0, 1, 0, 3] and len(build(3).model.layers) == 1
