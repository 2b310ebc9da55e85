"""The whole model: its loss, its start, and its logits against those of Hugging Face's models."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from megatron_sgt.model.gpt import LanguageModel, build_model
from megatron_sgt.model.hf_weights import megatron_shard
from tests.helpers.single import random_batch, single_groups, single_model, small_config
from tests.helpers.variants import make_weights_uneven

LLAMA3 = {"factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
# Hugging Face class, changes to its configuration, the same changes under Megatron's names.
TWINS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama grouped": ("Llama", {"num_key_value_heads": 2}, {"num_query_groups": 2}),
    "llama wide heads, tied": (
        "Llama",
        {"head_dim": 24, "tie_word_embeddings": True},
        {"kv_channels": 24, "untie_embeddings_and_output_weights": False},
    ),
    "llama biases, theta": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rms_norm_eps": 1e-3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        {"add_bias_linear": True, "layernorm_epsilon": 1e-3, "rotary_base": 500.0},
    ),
    "llama 3, scaled": (
        "Llama",
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}},
        {"rotary_base": 5e5, "rotary_scaling": {"type": "llama3", **LLAMA3}},
    ),
    "qwen2, yarn": (
        "Qwen2",
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", **YARN}},
        {"add_qkv_bias": True, "rotary_scaling": {"type": "yarn", **YARN}},
    ),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}, {"num_query_groups": 2, "add_qkv_bias": True}),
    "qwen3": (
        "Qwen3",
        {"num_key_value_heads": 2, "head_dim": 24},
        {"num_query_groups": 2, "kv_channels": 24, "qk_layernorm": True},
    ),
}


@pytest.mark.parametrize("twin", TWINS)
def test_logits_of_hugging_face(twin: str) -> None:
    kind, hf_changes, changes = TWINS[twin]
    config = small_config(model={"vocab_size": 100, **changes})
    settings = {
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **hf_changes,
    }
    hf_config = getattr(transformers, f"{kind}Config")(**settings)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(hf_config).eval()
    make_weights_uneven(theirs)
    weights = dict(theirs.state_dict())
    if hf_config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    ours = single_model(config).eval()
    missing, unexpected = ours.gpt.load_state_dict(megatron_shard(weights, config.model), strict=False)
    assert not unexpected
    assert all(name.endswith("_extra_state") for name in missing)
    tokens = random_batch(config)["tokens"]
    with torch.no_grad():
        wanted = theirs(tokens).logits
    found = ours.logits(tokens)
    assert wanted.std() > 0.5
    assert found.shape == (2, 32, 128)
    torch.testing.assert_close(found[..., :100], wanted, rtol=1e-5, atol=1e-5)


def test_loss_is_the_mean_over_unmasked_positions() -> None:
    config = small_config()
    model, batch = single_model(config), random_batch(config)
    make_weights_uneven(model)
    losses = F.cross_entropy(model.logits(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), reduction="none")
    masks = {
        "all": torch.ones(2, 32),
        "some": (torch.arange(64).view(2, 32) % 3 == 0).float(),
        "one": F.one_hot(torch.tensor(37), 64).view(2, 32).float(),
    }
    for mask in masks.values():
        batch["loss_mask"] = mask
        wanted = losses[mask.flatten().bool()].mean()
        assert model(**batch).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_micro_batch_without_any_label() -> None:
    config = small_config()
    model, batch = single_model(config), random_batch(config)
    batch["loss_mask"] = torch.zeros(2, 32)
    loss = model(**batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_masked_labels_leave_no_gradient() -> None:
    config = small_config()
    model, batch = single_model(config), random_batch(config)
    batch["loss_mask"][:, 16:] = 0.0
    grads = []
    for shift in (0, 1):
        model.zero_grad()
        batch["labels"][:, 16:] = (batch["labels"][:, 16:] + shift) % 128
        model(**batch).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def start(seed: int = 1234, **model: Any) -> LanguageModel:
    return single_model(small_config(model=model, train={"seed": seed}))


def test_the_seed_decides_the_initial_weights() -> None:
    first, again, other = (dict(start(seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = [name for name in first if not torch.equal(first[name], other[name])]
    assert changed == [name for name in first if first[name].dim() >= 2]


def test_a_new_model_knows_nothing() -> None:
    config = small_config()
    model = single_model(config)
    assert model(**random_batch(config)).item() == pytest.approx(math.log(128), abs=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_precision_of_the_weights(precision: str) -> None:
    config = small_config()
    model = build_model(config, single_groups(config), precision, 2)
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert {p.dtype for p in model.parameters()} == {wanted}
    loss = model(**random_batch(config))
    assert loss.dtype == torch.float32 and bool(loss.isfinite())


def test_the_meter_has_the_models_size() -> None:
    config = small_config()
    model = build_model(config, single_groups(config), "fp32", 3)
    assert model.meter.reduce(single_groups(config)).shape == (4, 3, 4)
    assert not model.meter.enabled


def test_state_dict_is_weights_only_and_loads_strictly() -> None:
    first, second = start(1), start(2)
    state = first.state_dict()
    assert set(state) == {name for name, _ in first.named_parameters()}
    second.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_tied_embeddings_are_one_parameter() -> None:
    names = [name for name, _ in start(untie_embeddings_and_output_weights=False).named_parameters()]
    assert not [name for name in names if "output_layer" in name]
    assert "gpt.output_layer.weight" in [name for name, _ in start().named_parameters()]


def test_logits_have_no_gradient() -> None:
    config = small_config()
    assert not single_model(config).logits(random_batch(config)["tokens"]).requires_grad
