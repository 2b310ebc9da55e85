"""The causal mask of exported models, with padding and after what a cache holds."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from megatron_sgt.export.hf.mask_sgt import causal_mask
from tests.helpers.hf_models import hf_config, hf_model, random_ids


def test_padding_and_cached_tokens_count() -> None:
    config = hf_config("never_grown")
    config._attn_implementation = "sdpa"
    cache = DynamicCache(config=config)
    with torch.no_grad():
        hf_model("never_grown")(random_ids(1, 2), past_key_values=cache)
    position = torch.arange(2, 5)
    padding = torch.tensor([[0, 1, 1, 1, 1]])
    mask = causal_mask(config, torch.zeros(1, 3, 48), padding, position, cache, position[None])
    expected = torch.tensor([[0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 1, 1, 1]]).bool()
    assert torch.equal(mask[0, 0], expected)
