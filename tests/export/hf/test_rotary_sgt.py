"""Rotary positions of exported models: exact angles in every type, and scaled ones as transformers' Llama has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from megatron_sgt.export.hf.modeling_sgt import SGTForCausalLM
from megatron_sgt.export.hf.rotary_sgt import SGTRotaryEmbedding
from tests.helpers.hf_folders import SCALED
from tests.helpers.hf_models import gap, hf_config, hf_model, random_ids, reference_logits

KINDS = {name: settings["rope_scaling"] for name, (_, settings) in SCALED.items()}
THETA = 5e5


def test_angles_do_not_depend_on_the_models_dtype() -> None:
    """In bf16 neighbouring positions above 256 would get the same angle."""
    positions = torch.tensor([[0, 1, 256, 257, 3001]])
    rotary = SGTRotaryEmbedding(hf_config())
    exact = [t.double() for t in rotary(torch.ones(1), positions)]
    angle = positions.double()[..., None] / 10000 ** (torch.arange(0, 12, 2, dtype=torch.float64) / 12)
    assert (exact[0][..., :6] - angle.cos()).abs().max() < 1e-3 and (exact[1][..., 6:] - angle.sin()).abs().max() < 1e-3
    rounded = rotary(torch.ones(1).bfloat16(), positions)
    assert all(torch.equal(r, e.bfloat16()) for r, e in zip(rounded, exact, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_as_in_transformers_itself(kind: str) -> None:
    """The same logits as a Llama of the same weights, far beyond the context before the scaling."""
    rope = {"rope_theta": THETA, "rope_scaling": dict(KINDS[kind])}
    ours = hf_model("never_grown", **rope)
    shape = {name: getattr(ours.config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    shape |= {name: getattr(ours.config, name) for name in ("num_hidden_layers", "num_attention_heads", "head_dim")}
    config = transformers.LlamaConfig(**shape, **rope, max_position_embeddings=64, rms_norm_eps=1e-6)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict())
    tokens = random_ids(2, 64)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert gap(ours(tokens).logits, expected) < 1e-4
        assert gap(hf_model("never_grown", rope_theta=THETA)(tokens).logits, expected) > 0.1, "the scaling matters"
    assert not dict(ours.model.rotary_emb.named_buffers()), "a buffer would be cast with the model"
    x = torch.ones(1)
    for found, wanted in zip(
        ours.bfloat16().model.rotary_emb(x, tokens), theirs.model.rotary_emb(x, tokens), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", ["llama_3.1", "qwen3_yarn"])
def test_loops_turn_by_the_same_positions(kind: str) -> None:
    model = hf_model("grouped_qk_norm_depth_3", rope_theta=THETA, rope_scaling=dict(KINDS[kind]))
    tokens = random_ids(2, 40)
    with torch.no_grad():
        assert gap(model(tokens).logits, reference_logits(model, tokens)) < 1e-4


@pytest.mark.parametrize("kind", ["llama_3.1", "qwen2_yarn"])
def test_a_folder_keeps_them(kind: str, tmp_path: Path) -> None:
    """Saved and opened by transformers, whose loading goes through the meta device and the stored type."""
    model = hf_model(rope_theta=THETA, rope_scaling=dict(KINDS[kind]))
    model.save_pretrained(tmp_path)
    again = SGTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.config.rope_parameters == model.config.rope_parameters == {**KINDS[kind], "rope_theta": THETA}
    assert again.config.rope_theta == THETA
    assert torch.equal(again.model.rotary_emb.frequencies, model.model.rotary_emb.frequencies)


@pytest.mark.parametrize(
    "given",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 500.0},
    ],
)
def test_either_versions_names_are_read(given: dict[str, Any]) -> None:
    config = SGTConfig(**given)
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    assert config.rope_scaling["factor"] == 2.0 and config.rope_theta == 500.0


def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="rope_type 'dynamic': choose default, linear, llama3, yarn"):
        hf_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def test_another_type_that_was_set_later_is_refused_too() -> None:
    config = hf_config()
    with pytest.raises(ValueError, match="rope_type 'dynamic': choose default, linear"):
        config.rope_parameters = {"rope_type": "dynamic", "rope_theta": THETA, "factor": 4.0}
    config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ValueError, match="rope_type 'dynamic': choose default, linear"):
        SGTRotaryEmbedding(config)
