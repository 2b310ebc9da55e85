"""Where the norms of an exported layer stand, and which of them are over all heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.hf_models import gap, hf_config, hf_model


def test_norms_of_outputs_are_under_olmo2s_names() -> None:
    layer = hf_model("olmo2_depth_2").model.layers[0]
    found = {name: tuple(p.shape) for name, p in layer.named_parameters() if "norm" in name}
    assert found == {
        "self_attn.q_norm.weight": (48,),
        "self_attn.k_norm.weight": (24,),
        "post_attention_layernorm.weight": (48,),
        "post_feedforward_layernorm.weight": (48,),
    }
    x = torch.randn(2, 3, 48)
    assert layer.attention_input(x) is x
    assert gap(layer.attention_output(x), layer.post_attention_layernorm(x)) == 0
    assert gap(layer.mlp_output(x), layer.post_feedforward_layernorm(layer.mlp(x))) == 0


def test_norms_of_inputs_are_under_llamas_names() -> None:
    layer = hf_model().model.layers[0]
    found = [name for name, _ in layer.named_parameters() if "norm" in name]
    assert found == ["input_layernorm.weight", "post_attention_layernorm.weight"]
    x = torch.randn(2, 3, 48)
    assert layer.attention_output(x) is x
    assert gap(layer.attention_input(x), layer.input_layernorm(x)) == 0
    assert gap(layer.mlp_output(x), layer.mlp(layer.post_attention_layernorm(x))) == 0


def test_a_share_of_the_heads_cannot_be_normalised_over_all() -> None:
    attention = hf_model("olmo2_depth_2").model.layers[0].self_attn
    with pytest.raises(ValueError, match=r"2 of 4 heads are on this rank, .* without tensor parallelism"):
        attention.normalised(torch.randn(1, 3, 24), torch.randn(1, 3, 12))


@pytest.mark.parametrize("wrong", [{"norm_position": "both"}, {"qk_norm_over": "layer"}])
def test_unknown_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} .*: choose"):
        hf_config(**wrong)
