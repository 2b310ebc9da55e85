"""Exported models against the reference, and through everything that transformers does with a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache, __version__

from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from megatron_sgt.export.hf.modeling_sgt import SGTForCausalLM
from tests.helpers.hf_models import (
    VARIANTS,
    as_llama,
    gap,
    hf_model,
    random_ids,
    reference_logits,
    unrolled_llama,
)
from tests.helpers.reference_sgt import next_token_loss

OLD_TRANSFORMERS = __version__.startswith("4.")
LOOPING = "grouped_qk_norm_depth_3"
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 24}


def generate(model: SGTForCausalLM, tokens: Tensor, **options: Any) -> Tensor:
    """New tokens alone."""
    with torch.no_grad():
        return model.generate(tokens, **{**GREEDY, **options})[:, tokens.shape[1] :]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_equals_the_reference(variant: str, attention: str) -> None:
    model, tokens = hf_model(variant), random_ids(2, 20)
    model.set_attn_implementation(attention)
    assert gap(model(tokens).logits, reference_logits(model, tokens)) < 5e-5


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize(
    "variant", ["multi_query_tied_biases_depth_2", LOOPING, "window", "block_loop", "olmo2_depth_2"]
)
def test_gradients_equal_the_references_with_and_without_checkpointing(variant: str) -> None:
    model, tokens = hf_model(variant).train(), random_ids(2, 12)

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, torch.autograd.grad(loss, [p for _, p in model.named_parameters()]), strict=True))

    names = [name for name, _ in model.named_parameters()]
    expected = next_token_loss(reference_logits(model, tokens), tokens)
    loss = model(tokens, labels=tokens).loss
    assert gap(loss, expected) < 1e-5
    wanted, plain = gradients(expected), gradients(loss)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    recomputed = gradients(model(tokens, labels=tokens).loss)
    for name in names:
        tolerance = 5e-5 * (1 + float(wanted[name].abs().max()))
        assert gap(plain[name], wanted[name]) < tolerance, name
        assert gap(recomputed[name], plain[name]) < 1e-6, name


def make_cache(kind: str, config: SGTConfig) -> Any:
    if kind == "static":
        return StaticCache(config, max_cache_len=40)
    return DynamicCache(config=config) if kind == "dynamic" else DynamicCache()


@pytest.mark.parametrize("variant", [LOOPING, "window", "block_loop", "olmo2_depth_2"])
@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
def test_chunks_through_a_cache_equal_one_forward(variant: str, kind: str) -> None:
    model, tokens = hf_model(variant), random_ids(2, 30)
    cache = make_cache(kind, model.config)
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        seen, parts = 0, []
        for length in (11, 1, 1, 8, 9):
            chunk = tokens[:, seen : seen + length]
            position = torch.arange(seen, seen + length)
            parts.append(model(chunk, past_key_values=cache, cache_position=position).logits)
            seen += length
    assert gap(torch.cat(parts, dim=1), whole) < 5e-5


def test_generation_is_the_same_with_every_cache() -> None:
    model, prompts = hf_model(LOOPING), random_ids(3, 9)
    uncached = generate(model, prompts, use_cache=False)
    assert len(uncached.unique()) > 10, "a repeating text shows little"
    assert torch.equal(generate(model, prompts), uncached)
    assert torch.equal(generate(model, prompts, cache_implementation="static"), uncached)
    unused = next(n for n in range(96) if n not in uncached)  # transformers 4 wants an end here
    looked_up = generate(model, prompts[:1], prompt_lookup_num_tokens=3, eos_token_id=unused)
    assert torch.equal(looked_up, uncached[:1]), "cutting off refused guesses has broken the cache"
    with torch.no_grad():
        steps = [model(torch.cat([prompts, uncached[:, :n]], 1)).logits[:, -1].argmax(-1) for n in range(24)]
    assert torch.equal(torch.stack(steps, 1), uncached)


def test_a_text_without_tokens_begins_with_bos() -> None:
    model = hf_model(LOOPING)
    with torch.no_grad():
        alone = model.generate(**GREEDY)
        assert torch.equal(alone, model.generate(torch.tensor([[1]]), **GREEDY)), "bos_token_id"
        nothing = torch.zeros(2, 0, dtype=torch.long)
        for inputs in ({"inputs": nothing}, {"input_ids": nothing, "attention_mask": nothing}):
            assert torch.equal(model.generate(**inputs, **GREEDY), alone.repeat(2, 1))
    model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match=r"generation_config.bos_token_id is not set"):
        model.generate(nothing, **GREEDY)


@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 2, "num_return_sequences": 2},
                                     {"do_sample": True, "top_k": 20}])  # fmt: skip
def test_beams_and_sampling_do_not_depend_on_the_cache(options: dict[str, Any]) -> None:
    model, prompts = hf_model(LOOPING), random_ids(2, 7)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(generate(model, prompts, use_cache=use_cache, **options))
    assert torch.equal(*found)


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_batch_of_unequal_prompts_equals_one_by_one(cache: str | None) -> None:
    model = hf_model(LOOPING)
    prompts = [random_ids(1, n, seed=n) for n in (3, 11, 6)]
    width = max(p.shape[1] for p in prompts)
    padded = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts])
    together = generate(model, padded, attention_mask=mask, cache_implementation=cache)
    alone = torch.cat([generate(model, p) for p in prompts])
    assert torch.equal(together, alone)


def test_outputs_have_the_shapes_of_every_decoder() -> None:
    model, tokens = hf_model(LOOPING), random_ids(2, 8)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True, output_attentions=True)
        parts = model(tokens, return_dict=False)
        tail = model(tokens, logits_to_keep=2).logits
        embedded = model(inputs_embeds=model.get_input_embeddings()(tokens)).logits
    assert [tuple(h.shape) for h in out.hidden_states] == [(2, 8, 48)] * 5
    assert [tuple(a.shape) for a in out.attentions] == [(2, 4, 8, 8)] * 4
    assert all(gap(a.sum(-1), torch.ones(2, 4, 8)) < 1e-5 for a in out.attentions)
    assert gap(model.lm_head(out.hidden_states[-1]), out.logits) == 0
    assert isinstance(parts, tuple) and gap(parts[0], out.logits) == 0
    assert gap(tail, out.logits[:, -2:]) < 1e-5 and gap(embedded, out.logits) == 0
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("chosen", [True, [0, -1], 2])
def test_without_loops_outputs_are_llamas(attention: str, chosen: Any) -> None:
    """transformers 5 knows the choice of some hidden states; 4 gives all of them."""
    model, tokens = hf_model("never_grown", num_key_value_heads=2), random_ids(2, 8)
    llama = as_llama(model)
    with torch.no_grad():
        outputs = []
        for each in (model, llama):
            each.set_attn_implementation(attention)
            outputs.append(each(tokens, output_attentions=True, output_hidden_states=chosen))
    found, expected = outputs
    for one, other in zip(found.attentions, expected.attentions or (), strict=True):
        assert one.dtype == other.dtype and gap(one, other) < 1e-6
    assert len(found.attentions) == (4 if attention == "eager" else 0)
    assert len(found.hidden_states) == len(expected.hidden_states) == 5
    every = model(tokens, output_hidden_states=True).hidden_states
    for number, (one, other) in enumerate(zip(found.hidden_states, expected.hidden_states, strict=True)):
        if one is None:
            assert chosen is not True and (other is None or OLD_TRANSFORMERS)
        else:
            assert gap(one, other) < 1e-5 and gap(one, every[number]) < 1e-5


def test_attentions_of_a_looping_model_are_those_of_its_ordinary_passes() -> None:
    """The last one of a block loop; Llama with a layer for every pass has them all."""
    model = hf_model("never_grown", sgt_loops={"1": {"heads": [0, 3], "depth": 2}, "2": {"block_loops": 1}})
    llama, tokens = unrolled_llama(model), random_ids(2, 8)
    for each in (model, llama):
        each.set_attn_implementation("eager")
    found, every = (each(tokens, output_attentions=True).attentions for each in (model, llama))
    assert len(found) == 4 and len(every) == 7
    for one, number in zip(found, (0, 1, 5, 6), strict=True):
        assert gap(one, every[number]) < 1e-5


def test_saved_with_its_code_it_is_the_same_model(tmp_path: Path) -> None:
    SGTConfig.register_for_auto_class()
    SGTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model, tokens = hf_model(LOOPING), random_ids(2, 8)
    try:
        model.save_pretrained(tmp_path / "one")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", trust_remote_code=True).eval()
        loaded.save_pretrained(tmp_path / "two")
    finally:
        SGTConfig._auto_class = SGTForCausalLM._auto_class = None
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert {"attention_sgt.py", "configuration_sgt.py", "modeling_sgt.py", "config.json"} <= names
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=True).eval()
    assert type(again).__module__.startswith("transformers_modules")
    for other in (loaded, again):
        assert torch.equal(other(tokens).logits, model(tokens).logits)
    assert AutoConfig.from_pretrained(tmp_path / "two", trust_remote_code=True).sgt_loops == model.config.sgt_loops
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "two", trust_remote_code=False)


@pytest.mark.parametrize("variant", [LOOPING, "multi_query_tied_biases_depth_2"])
def test_embeddings_can_be_resized_and_stay_tied(variant: str, tmp_path: Path) -> None:
    model, tokens = hf_model(variant), random_ids(2, 8)
    before = model(tokens).logits
    model.resize_token_embeddings(110)
    after = model(tokens).logits
    assert after.shape[-1] == model.config.vocab_size == 110 and gap(after[..., :96], before) < 1e-5
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    again = SGTForCausalLM.from_pretrained(tmp_path).eval()
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again(tokens).logits, after)


def test_it_trains_through_transformers() -> None:
    model, tokens = hf_model(LOOPING).train(), random_ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens, attention_mask=torch.ones_like(tokens)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_cast_to_bf16_it_is_the_same_model_up_to_rounding() -> None:
    model, tokens = hf_model(LOOPING, max_position_embeddings=512), random_ids(1, 400)
    with torch.no_grad():
        exact = model(tokens).logits
        rough = model.bfloat16()(tokens).logits.float()
    late = slice(300, None)
    relative = (rough - exact)[:, late].norm() / exact[:, late].norm()
    assert relative < 0.05, relative


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.compile lags behind new Pythons")
def test_compiles_into_one_graph() -> None:
    model, tokens = hf_model(LOOPING), random_ids(2, 8)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert gap(compiled(tokens, use_cache=False).logits, model(tokens).logits) < 1e-5
