"""The form for serving: the same function in ordinary use, and under runtimes with a cache of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from megatron_sgt.export.hf.modeling_sgt_serving import SGTServingForCausalLM
from tests.helpers.exhaustive import exhaustive
from tests.helpers.hf_models import gap
from tests.helpers.serving import KINDS, TOKENS, Pair, for_serving, pair_of, served, standard_model

NEWEST = not transformers.__version__.startswith("4.")


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return pair_of(request.param)


@torch.no_grad()
def test_it_is_the_same_function_in_ordinary_use(pair: Pair) -> None:
    serving, standard = pair.serving, pair.standard
    assert gap(serving(TOKENS).logits, pair.expected) < 1e-5
    for options in ({}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}):
        texts = [model.generate(TOKENS, do_sample=False, max_new_tokens=8, **options) for model in (serving, standard)]
        assert torch.equal(*texts), options
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0
    padded = [model.generate(TOKENS, attention_mask=mask, do_sample=False, max_new_tokens=8)
              for model in (serving, standard)]  # fmt: skip
    assert torch.equal(*padded)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_runtime_with_a_cache_by_index_is_right(pair: Pair, kind: str) -> None:
    for found, expected in zip(served(pair.serving, kind, *TOKENS), pair.expected, strict=True):
        assert gap(found, expected) < 1e-5


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_standard_form_is_refused_there(pair: Pair, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"'{kind}' would mix up the attention passes .* --for serving"):
        served(pair.standard, kind, *TOKENS)


@pytest.mark.parametrize("attention", ["sdpa", exhaustive("eager")])
def test_continuous_batching_is_generate(pair: Pair, attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = pair.serving, [TOKENS[0, :9], TOKENS[1, :14]]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    options: dict[str, Any] = {}
    if NEWEST:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        model.set_attn_implementation(attention)
        options["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    else:
        from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

        # Without a GPU it knows no memory, and serves no model at all.
        monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda *_: 2**28)
        model.set_attn_implementation(f"{attention}_paged")
        config.num_blocks, config.max_batch_tokens = 16, 32
    found = model.generate_batch(inputs=[p.tolist() for p in prompts], generation_config=config, **options)
    texts = sorted((result.prompt_ids, result.generated_tokens) for result in found.values())
    model.set_attn_implementation("sdpa")
    wanted = [model.generate(p[None], do_sample=False, max_new_tokens=8)[0, len(p) :].tolist() for p in prompts]
    assert texts == sorted(zip([p.tolist() for p in prompts], wanted, strict=True))


def test_pipeline_stages_and_attentions_are_refused() -> None:
    model = for_serving(standard_model("two_of_eight_heads"))
    with pytest.raises(ValueError, match="3 layers with 4 attention passes cannot be cut into pipeline stages"):
        _ = model.model.supports_pp_plan
    with pytest.raises(ValueError, match="export it --for standard"):
        model(TOKENS, output_attentions=True)


@torch.no_grad()
def test_norms_of_outputs_and_over_all_heads_are_right_too() -> None:
    norms = {"norm_position": "output", "qk_norm": True, "qk_norm_over": "all"}
    standard = standard_model("two_of_eight_heads", **norms)
    expected = standard(TOKENS).logits
    serving = for_serving(standard)
    assert gap(serving(TOKENS).logits, expected) < 1e-9
    assert max(gap(*both) for both in zip(served(serving, "vllm", *TOKENS), expected, strict=True)) < 1e-5


def test_names_by_which_runtimes_know_it() -> None:
    model = for_serving(standard_model("depths_qk_norm"))
    passes = [(name, m.layer_idx) for name, m in model.named_modules() if type(m).__name__ == "SGTPass"]
    assert passes == [(f"model.passes.{n}", n) for n in range(8)], "vLLM wants one number in a name: the index"
    assert not [name for name, _ in model.named_parameters() if ".passes." in name]
    assert model.state_dict().keys() == standard_model("depths_qk_norm").state_dict().keys()


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains(pair: Pair, checkpointing: bool) -> None:
    gradients = []
    for model in (pair.standard, pair.serving):
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(TOKENS, labels=TOKENS).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        model.gradient_checkpointing_disable()
        model.eval()
    assert max(gap(*both) for both in zip(*gradients, strict=True)) < 1e-9


@torch.no_grad()
def test_saved_with_its_code_it_is_the_same_model(tmp_path: Path) -> None:
    model = for_serving(standard_model("block_and_heads_in_a_window"))
    type(model.config).register_for_auto_class()
    SGTServingForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    try:
        model.save_pretrained(tmp_path)
    finally:
        type(model.config)._auto_class = SGTServingForCausalLM._auto_class = None
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, dtype="auto").eval()
    assert type(again).__module__.startswith("transformers_modules")
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="torch.compile lags behind new Pythons")
@torch.no_grad()
def test_compiles_into_one_graph() -> None:
    model = for_serving(standard_model("block_and_heads_in_a_window"))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert gap(compiled(TOKENS, use_cache=False).logits, model(TOKENS).logits) < 1e-9
