"""Attention of exported models: only kept heads are computed, caches get room."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megatron_sgt.export.hf.cache_sgt import make_room_for_loops
from tests.helpers.hf_models import gap, hf_config, hf_model, random_ids


def test_loops_compute_the_kept_heads_alone() -> None:
    """Exactly: q, k, v and output projection of 2 of 4 heads in 1 of 2 groups, and their attention."""
    tokens = random_ids(1, 16)

    def flops(loops: dict[str, Any]) -> int:
        model = hf_model(num_key_value_heads=2, sgt_loops=loops)
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens, use_cache=False)
        return counter.get_total_flops()

    size, hidden = 12, 48
    projections = 2 * 16 * hidden * (2 + 1 + 1 + 2) * size
    attention = 4 * 2 * 16 * 16 * size
    one_pass = flops({"2": {"heads": [0, 1], "depth": 1}}) - flops({})
    assert one_pass == projections + attention
    assert flops({"2": {"heads": [0, 1], "depth": 3}}) - flops({}) == 3 * one_pass


@pytest.mark.parametrize("kind", ["subclass", "hook"])
def test_wrapped_projections_are_called_not_sliced(kind: str) -> None:
    """Adapters, quantised and offloaded modules have no weight to take rows of."""

    class Wrapped(nn.Linear):
        pass

    model, tokens = hf_model("grouped_qk_norm_depth_3"), random_ids(2, 9)
    expected = model(tokens).logits
    attention = model.model.layers[3].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        plain = getattr(attention, name)
        if kind == "hook":
            plain._hf_hook = object()
            continue
        wrapped = Wrapped(plain.in_features, plain.out_features, bias=plain.bias is not None)
        wrapped.load_state_dict(plain.state_dict())
        setattr(attention, name, wrapped)
    assert gap(model(tokens).logits, expected) < 1e-5


def test_every_attention_implementation_sees_loops_as_attention_of_fewer_heads() -> None:
    """What flash and other kernels are handed through transformers' attention interface."""
    seen = []

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append((query.shape[1], key.shape[1], module.num_key_value_groups, module.is_causal))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)

    kernel.__module__ = "transformers.integrations.counted"  # one of its own: others are refused
    ALL_ATTENTION_FUNCTIONS.register("counted", kernel)
    model = hf_model("grouped_qk_norm_depth_3")
    expected = model(random_ids(1, 8)).logits
    model.set_attn_implementation("counted")
    assert gap(model(random_ids(1, 8)).logits, expected) < 1e-5
    ordinary, three, two = (4, 2, 2, True), (3, 3, 1, True), (2, 2, 1, True)
    assert seen == [ordinary, ordinary, three, ordinary, ordinary, two, two, two]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_gets_one_entry_per_pass_in_the_order_of_execution(kind: str) -> None:
    model = hf_model("grouped_qk_norm_depth_3")
    config = model.config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=20)
    with torch.no_grad():
        model(random_ids(2, 7), past_key_values=cache)
    held = [tuple(layer.keys.shape) for layer in cache.layers]
    length = 7 if kind == "dynamic" else 20
    heads = [
        2,
        2,
        2,
        2,
        2,
        2,
        2,
        2,
    ]  # ordinary, ordinary, loop of 0 1 2 (groups 0 1), two ordinary, three loops
    assert held == [(2, n, length, 12) for n in heads]
    assert all(int(layer.get_seq_length()) == 7 for layer in cache.layers)


def test_a_cache_in_use_by_another_model_is_refused() -> None:
    config = hf_config()
    cache = DynamicCache(config=hf_config("never_grown"))
    with torch.no_grad():
        hf_model("never_grown")(random_ids(1, 4), past_key_values=cache)
    with pytest.raises(ValueError, match="4 entries of another model; a model with 5 attention passes in 4 layers"):
        make_room_for_loops(cache, config)
