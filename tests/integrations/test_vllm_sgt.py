"""The vLLM plugin: passes, names of weights, refusals, and its arithmetic on stand-ins of vLLM's layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.architecture.source_tree import ROOT
from tests.helpers.hf_models import VARIANTS, gap, hf_config, hf_model, random_ids, reference_logits
from tests.helpers.vllm_stand_in import Engine, plugin_model
from vllm_sgt import passes
from vllm_sgt.config import CONFIGS, SGTConfig, SGTServingConfig
from vllm_sgt.passes import heads_of, passes_of
from vllm_sgt.settings import rope_parameters
from vllm_sgt.weights import stacked

WIDE = {
    "num_attention_heads": 8, "head_dim": 6,
    "sgt_loops": {"1": {"heads": [2, 5], "depth": 2}, "3": {"heads": [0, 1], "depth": 1}},
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in VARIANTS},
    "2 of 8 heads, 4 groups": ("multi_head", {**WIDE, "num_key_value_heads": 4}),
    "2 of 8 heads, 2 groups": ("multi_head", {**WIDE, "num_key_value_heads": 2, "qk_norm": True}),
    "layer norm, no gate": (
        "multi_head",
        {"normalization": "LayerNorm", "gated_mlp": False, "hidden_act": "gelu", "mlp_bias": True},
    ),
}


@pytest.fixture(scope="module")
def plugin() -> Iterator[ModuleType]:
    with plugin_model() as module:
        yield module


def exported(model: Any, serving: bool = False, **changes: Any) -> tuple[Any, list[tuple[str, Tensor]]]:
    """The configuration as the plugin reads it from ``config.json``, and the tensors in the folder."""
    entries = model.config.to_dict() | changes
    tied = model.config.tie_word_embeddings
    weights = [(n, t) for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")]
    if not serving:
        return SGTConfig(**{k: v for k, v in entries.items() if k != "model_type"}), weights
    layers = entries["num_hidden_layers"]
    entries["sgt_num_layers"] = layers
    entries["num_hidden_layers"] = sum(model.config.passes_of(n) for n in range(layers))
    return SGTServingConfig(**{k: v for k, v in entries.items() if k != "model_type"}), weights


def served(engine: Engine, ids: Tensor, prompt: int) -> Tensor:
    """Logits [B, S, vocabulary]: the prompts in steps of two chunks each, then all requests token by token."""
    chunks: list[list[Tensor]] = [[] for _ in ids]
    cuts = [0, prompt // 2, prompt, *range(prompt + 1, ids.shape[1] + 1)]
    for start, end in pairwise(cuts):
        step = engine.step({n: (row[start:end], start) for n, row in enumerate(ids)})
        for n, part in enumerate(step.split(end - start)):
            chunks[n].append(part)
    return torch.stack([torch.cat(parts) for parts in chunks])


@pytest.mark.parametrize("option", ["all", "kept"])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_equal_the_model(plugin: ModuleType, name: str, option: str) -> None:
    variant, changes = MODELS[name]
    model = hf_model(variant, **changes).double()
    ids = random_ids(2, 14)
    with torch.no_grad():
        expected = model(ids).logits
    if name in VARIANTS:
        assert gap(expected, reference_logits(model, ids)) < 1e-5
    ranks = 2 if "2 of 8" in name or name.startswith(("multi_query", "olmo")) else 1
    config, weights = exported(model, serving=option == "kept", sgt_kv_heads=option)
    engine = Engine(plugin, config, weights, ranks=ranks)
    assert gap(served(engine, ids, prompt=8), expected) < 1e-5
    for (rank, stage), loaded in engine.loaded.items():
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
        assert loaded | tied == set(dict(engine.models[rank, stage].named_parameters(remove_duplicate=False)))


def test_pipeline_stages_give_the_same(plugin: ModuleType) -> None:
    model = hf_model("block_loop", tie_word_embeddings=True).double()
    ids = random_ids(1, 9)
    engine = Engine(plugin, *exported(model), ranks=2, stages=2)
    with torch.no_grad():
        assert gap(served(engine, ids, prompt=5), model(ids).logits) < 1e-5


def test_kept_heads_cache_less(plugin: ModuleType) -> None:
    model = hf_model("multi_head", **WIDE, num_key_value_heads=4)
    groups = {}
    for option in ("all", "kept"):
        engine = Engine(plugin, *exported(model, sgt_kv_heads=option))
        groups[option] = [layer.groups for layer in engine.contexts[0].values()]
    # Heads 2 and 5 are in groups 1 and 2, heads 0 and 1 both in group 0.
    assert groups == {"all": [4] * 7, "kept": [4, 4, 2, 2, 4, 4, 1]}


def test_a_rank_with_fewer_kept_groups_takes_others_at_gate_0() -> None:
    gates = [0, 0, 0, 0, 1, 0, 1, 0]  # of 8 heads in 4 groups: groups 2 and 3 are kept
    assert heads_of(gates, 4, "kept").groups == (2, 3)
    assert heads_of(gates, 4, "kept", rank=0, ranks=2) == passes.Heads((0, 1), (0, 0, 0, 0))
    assert heads_of(gates, 4, "kept", rank=1, ranks=2) == passes.Heads((0, 1), (1, 0, 1, 0))
    assert heads_of(gates, 2, "kept", rank=2, ranks=4) == passes.Heads((0,), (1, 0))
    assert heads_of([1] * 8, 4, "kept").gates is None


@pytest.mark.parametrize("serving", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_passes_are_numbered_as_the_cache_of_the_export_is(name: str, serving: bool) -> None:
    config = hf_config(name)
    entries = config.to_dict() | ({"num_hidden_layers": 99, "sgt_num_layers": 4} if serving else {})
    own = SGTConfig(**{k: v for k, v in entries.items() if k != "model_type"})
    assert passes.real_layers(own) == 4
    counts = [len([one for run in passes_of(own, n) for one in run]) for n in range(4)]
    assert counts == [config.passes_of(n) for n in range(4)]
    indices = [one.index for n in range(4) for run in passes_of(own, n) for one in run]
    assert indices == list(range(sum(counts)))


def test_names_of_weights() -> None:
    assert stacked("model.layers.3.self_attn.v_proj.bias", True) == ("model.layers.3.self_attn.qkv_proj.bias", "v")
    assert stacked("model.layers.3.mlp.up_proj.weight", True) == ("model.layers.3.mlp.gate_up_proj.weight", 1)
    for name, gated in (
        ("model.layers.3.mlp.up_proj.weight", False),
        ("model.layers.3.self_attn.q_norm.weight", True),
        ("model.layers.3.self_attn.o_proj.weight", True),
        ("lm_head.weight", True),
    ):
        assert stacked(name, gated) == (name, None)


def test_rotary_settings_of_both_versions() -> None:
    assert rope_parameters(SGTConfig(rope_theta=5e5)) == {"rope_type": "default", "rope_theta": 5e5}
    old = SGTConfig(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.0})
    assert rope_parameters(old) == {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize("kind", CONFIGS)
def test_scaled_positions_are_read_as_transformers_4_saves_them(kind: Any, tmp_path: Path) -> None:
    scaled = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 5e5}
    entries = hf_config(rope_parameters=scaled).to_dict() | {"model_type": kind.model_type, "sgt_num_layers": 4}
    entries["rope_scaling"] = {name: value for name, value in scaled.items() if name != "rope_theta"}
    (tmp_path / "config.json").write_text(json.dumps(entries), encoding="utf-8")
    found = kind.from_pretrained(tmp_path)
    assert (rope_parameters(found), found.max_position_embeddings, found.head_dim) == (scaled, 64, 12)


@pytest.mark.parametrize(
    ("changes", "ranks", "settings", "message"),
    [
        ({}, 3, {}, "4 query heads in 4 key/value groups cannot be divided among 3"),
        ({"sliding_window": 8}, 1, {}, "sliding_window 8"),
        ({"sgt_kv_heads": "some"}, 1, {}, "sgt_kv_heads is 'some'; it is 'all' or 'kept'"),
        ({"sgt_kv_heads": "kept"}, 1, {"kv_transfer_config": object()}, "a KV connector does not expect"),
        ({"sgt_loops": {"1": {"heads": [4], "depth": 1}}}, 1, {}, r"layer 1 loops heads \[4\] of 4"),
    ],
)
def test_refusals(plugin: ModuleType, changes: Any, ranks: int, settings: Any, message: str) -> None:
    config, weights = exported(hf_model("multi_head"), **changes)
    with pytest.raises(ValueError, match=message):
        Engine(plugin, config, weights, ranks=ranks, **settings)


def test_a_tensor_that_the_model_does_not_have_is_refused(plugin: ModuleType) -> None:
    config, weights = exported(hf_model("multi_head"))
    with pytest.raises(ValueError, match=r"a tensor model\.other, and this model none"):
        Engine(plugin, config, [*weights, ("model.other", torch.zeros(1))])


def test_the_main_package_does_not_contain_the_plugin() -> None:
    assert 'find_packages(include=["megatron_sgt", "megatron_sgt.*"])' in (ROOT / "setup.py").read_text("utf-8")
    text = (ROOT / "integrations" / "vllm_sgt" / "pyproject.toml").read_text("utf-8")
    assert '[project.entry-points."vllm.general_plugins"]\nsgt = "vllm_sgt:register"' in text
