"""What transformers tests of ``generate`` for its own models, beside test_modeling_sgt.py.

Its own tests of generation (GenerationTesterMixin) are in no package that can be downloaded; these are written after
the list of what they check. The reference is Llama with a layer for every attention pass.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from tests.helpers.exhaustive import exhaustive
from tests.helpers.hf_models import gap, hf_model, random_ids, unrolled_llama
from tests.helpers.serving import for_serving

LOOPS = {
    "3": {"heads": [0, 3], "depth": 2},
    "1": {"heads": [0, 1, 2], "depth": 1, "other_gate": 0.4},
    "0": {"block_loops": 1},
}
PASSES = 2 + 2 + 1 + 3


@pytest.fixture
def model() -> Any:
    return hf_model("never_grown", num_key_value_heads=2, sgt_loops=LOOPS)


def generate(model: Any, tokens: Tensor | None, **options: Any) -> Any:
    with torch.no_grad():
        return model.generate(tokens, **{"do_sample": False, "max_new_tokens": 8, **options})


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}, {"use_cache": False},
                                     {"num_beams": 2, "do_sample": True}, {"repetition_penalty": 1.5}],
                         ids=lambda options: "_".join(options) or "greedy")  # fmt: skip
def test_texts_scores_and_logits_are_those_of_the_unrolled_llama(model: Any, options: dict[str, Any]) -> None:
    prompts, found = random_ids(2, 6), []
    for each in (model, unrolled_llama(model)):
        each.generation_config.pad_token_id = 0
        torch.manual_seed(4)
        found.append(
            generate(each, prompts, return_dict_in_generate=True, output_scores=True, output_logits=True, **options)
        )
    ours, expected = found
    assert torch.equal(ours.sequences, expected.sequences)
    for one, other in zip((*ours.scores, *ours.logits), (*expected.scores, *expected.logits), strict=True):
        finite = torch.isfinite(other)
        assert torch.equal(torch.isfinite(one), finite) and gap(one[finite], other[finite]) < 5e-5


@pytest.mark.parametrize("use_cache", [True, False])
def test_hidden_states_and_attentions_of_every_step(model: Any, use_cache: bool) -> None:
    model.set_attn_implementation("eager")
    out = generate(model, random_ids(2, 6), max_new_tokens=3, use_cache=use_cache, return_dict_in_generate=True,
                   output_attentions=True, output_hidden_states=True)  # fmt: skip
    assert len(out.hidden_states) == len(out.attentions) == 3
    for step, (states, attentions) in enumerate(zip(out.hidden_states, out.attentions, strict=True)):
        new, seen = (1, 6 + step) if use_cache and step else (6 + step, 6 + step)
        assert [tuple(state.shape) for state in states] == [(2, new, 48)] * 5
        assert [tuple(weights.shape) for weights in attentions] == [(2, 4, new, seen)] * 4


def test_a_text_is_continued_from_its_cache(model: Any) -> None:
    prompt = random_ids(1, 6)
    whole = generate(model, prompt, max_new_tokens=8)
    first = generate(model, prompt, max_new_tokens=5, return_dict_in_generate=True)
    cache = first.past_key_values
    assert len(cache.layers) == PASSES and cache.get_seq_length() == 10
    second = generate(model, first.sequences, max_new_tokens=3, past_key_values=cache)
    assert torch.equal(second, whole)


@pytest.mark.parametrize("cache", [None, "static"])
def test_embeddings_in_the_place_of_ids(model: Any, cache: str | None) -> None:
    prompt = random_ids(2, 6)
    embedded = model.get_input_embeddings()(prompt).detach()
    expected = generate(model, prompt)[:, 6:]
    assert torch.equal(generate(model, None, inputs_embeds=embedded, cache_implementation=cache), expected)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_positions_may_be_given_or_not(model: Any, kind: str) -> None:
    prompt = random_ids(2, 6)
    texts = []
    for options in ({}, {"position_ids": torch.arange(6)[None].expand(2, -1)}):
        for each in (model, unrolled_llama(model)):
            config = each.config
            cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config, max_cache_len=20)
            texts.append(generate(each, prompt, past_key_values=cache, **options))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[2], texts[3])


def test_assisted_by_another_model(model: Any) -> None:
    """The assistant loops elsewhere, and is wrong often enough that its guesses are cut off the cache again."""
    prompt = random_ids(1, 6)
    assistant = hf_model("never_grown", seed=0, num_key_value_heads=2, sgt_loops={"2": {"heads": [1], "depth": 1}})
    for each in (model, assistant):
        each.generation_config.eos_token_id, each.generation_config.pad_token_id = 1, 0
    expected = generate(model, prompt, max_new_tokens=16)
    assert torch.equal(generate(model, prompt, max_new_tokens=16, assistant_model=assistant), expected)


@pytest.mark.parametrize("serving", [False, True])
def test_assisted_by_its_own_first_layers(model: Any, serving: bool) -> None:
    """Layers of the form for serving are counted by their passes: 3 of them are layer 0, and no part of layer 1."""
    model = for_serving(model) if serving else model
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    prompt, layers = random_ids(1, 6), model.config.num_hidden_layers
    expected = generate(model, prompt, max_new_tokens=16)
    found = generate(model, prompt, max_new_tokens=16, assistant_early_exit=3 if serving else 1)
    assert torch.equal(found, expected) and model.config.num_hidden_layers == layers


def test_a_mask_for_each_head(model: Any) -> None:
    tokens = random_ids(1, 9)
    hidden = torch.ones(9, 9).triu(1).bool().repeat(1, 4, 1, 1)
    hidden[:, 1, 5:, :2] = hidden[:, 3, 4:, 2] = True
    mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found, expected = (
            each(tokens, attention_mask=mask, use_cache=False).logits for each in (model, unrolled_llama(model))
        )
    assert gap(found, expected) < 5e-5 < gap(found, model(tokens).logits)


def test_a_mask_of_four_dimensions(model: Any) -> None:
    """Two texts in one row, each blind for the other, with positions that begin again."""
    tokens = random_ids(1, 9)
    allowed = torch.ones(9, 9).tril().bool()
    allowed[4:, :4] = False
    mask = torch.zeros(9, 9).masked_fill(~allowed, torch.finfo(torch.float32).min)[None, None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
        alone = [model(part, use_cache=False).logits for part in (tokens[:, :4], tokens[:, 4:])]
    assert gap(packed, torch.cat(alone, dim=1)) < 5e-5


@pytest.mark.parametrize("mode", [exhaustive("flex_attention")])
def test_an_attention_that_is_compiled(mode: str) -> None:
    model, tokens = hf_model("window", hidden_size=64, head_dim=16), random_ids(2, 16)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        model.set_attn_implementation(mode)
        found = model(tokens, attention_mask=mask).logits
    assert gap(found[:, 4:], expected[:, 4:]) < 5e-5
