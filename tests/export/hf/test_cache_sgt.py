"""Caches and attention that loops of the standard form can live in get room; all others are refused, in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, StaticCache, cache_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.helpers.hf_models import gap, hf_model, random_ids
from tests.helpers.serving import KINDS, for_serving, registered, served, standard_model

TOKENS = random_ids(2, 12)
PAGED = [name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" in name]
LOOPING = "two_of_eight_heads"


@pytest.fixture(scope="module")
def model() -> Any:
    return standard_model(LOOPING)


def mine(*args: Any, **kwargs: Any) -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


class MyCache(DynamicCache):
    """A user's."""


class MyLayer(cache_utils.DynamicLayer):
    """A user's."""


def with_entry(entry: Any) -> DynamicCache:
    cache = DynamicCache()
    cache.layers = [entry for _ in range(3)]
    return cache


CACHES: dict[str, Callable[[Any], Any]] = {
    "MyCache": lambda config: MyCache(),
    "MyLayer": lambda config: with_entry(MyLayer()),
    "DynamicSlidingWindowLayer": lambda config: with_entry(cache_utils.DynamicSlidingWindowLayer(4)),
    "StaticSlidingWindowLayer": lambda config: with_entry(cache_utils.StaticSlidingWindowLayer(8, 4)),
    "EncoderDecoderCache": lambda config: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    "tuple": lambda config: ((torch.zeros(2, 2, 3, 8),) * 2,) * 3,
}


@pytest.mark.parametrize("kind", CACHES)
def test_unknown_caches_are_refused(model: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"the kind {kind} would mix up the attention passes .* --for serving"):
        model(TOKENS, past_key_values=CACHES[kind](model.config))


@pytest.mark.parametrize(
    "name", ["cache", "block_table", "read_index", "write_index", "attention_instances", "forward_batch"]
)
def test_arguments_of_runtimes_with_a_cache_of_their_own_are_refused(model: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"argument '{name}'.* --for serving"):
        model(TOKENS, use_cache=False, **{name: [0]})


@pytest.mark.parametrize("name", ["vllm", "sglang", "sdpa", "mine", *PAGED])
def test_foreign_attention_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = standard_model(LOOPING)
    if name not in PAGED:
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, mine)
    model.config._attn_implementation = name
    with pytest.raises(ValueError, match=r"the attention implementation .* --for serving"):
        model(TOKENS)


@pytest.mark.parametrize("other", [{"sgt_loops": {}}, {"sgt_loops": {}, "num_hidden_layers": 4}, KINDS["block_loop"]])
def test_a_cache_that_another_model_has_filled_is_refused(other: dict[str, Any]) -> None:
    """With 4 passes as well, which keep keys of other heads."""
    cache, model = DynamicCache(), standard_model(LOOPING, sgt_loops={"1": {"heads": [1, 2], "depth": 1}})
    with torch.no_grad():
        standard_model(LOOPING, **other)(TOKENS, past_key_values=cache)
        with pytest.raises(ValueError, match="entries of another model; a model with 4 attention passes in 3 layers"):
            model(TOKENS, past_key_values=cache)


class OneStream:
    """A stream on a machine that has none."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_offloaded_caches_are_right(model: Any, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: OneStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    cache = kind(config=model.config, **({"max_cache_len": 12} if kind is StaticCache else {}))
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, False, OneStream()
    model.set_attn_implementation("sdpa")
    parts = [model(TOKENS[:, n : n + 4], past_key_values=cache, cache_position=torch.arange(n, n + 4)).logits
             for n in (0, 4, 8)]  # fmt: skip
    assert gap(torch.cat(parts, 1), model(TOKENS, use_cache=False).logits) < 1e-6
    assert len(cache.layers) == 4


@pytest.mark.skipif(
    not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="transformers 4 has no kind without a package"
)
@torch.no_grad()
def test_quantised_caches_keep_each_pass(model: Any) -> None:
    """As the form for serving, to which it is a cache of so many layers. All heads loop: both hold the same."""
    standard = hf_model("never_grown", num_attention_heads=4, sgt_loops={"1": {"heads": [0, 1, 2, 3], "depth": 1}})
    found = []
    for each in (standard, for_serving(standard)):
        cache = cache_utils.QuantizedCache("fp8", each.config)
        found.append(torch.cat([each(TOKENS[:, n : n + 4], past_key_values=cache).logits for n in (0, 4, 8)], 1))
        assert len(cache.layers) == 5
    assert gap(*found) < 1e-5


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_without_loops_the_standard_form_is_right_under_every_runtime(kind: str) -> None:
    model = standard_model(LOOPING, sgt_loops={}, normalization="LayerNorm")
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        texts = random_ids(2, 16)
        expected = model(texts).logits
        with registered("mine", mine):
            model.config._attn_implementation = "mine"
            assert gap(model(texts, past_key_values=MyCache()).logits, expected) < 1e-6
    if kind == "sglang":
        found = served(model, kind, *texts)
        assert max(gap(*both) for both in zip(found, expected, strict=True)) < 1e-6
