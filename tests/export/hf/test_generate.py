"""Continuations: the same from a checkpoint and its export, alone and in a batch, by chance and without."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.export.hf.generate import Continuation, Sampling, generate
from megatron_sgt.export.hf.open_model import OpenModel, open_model
from tests.helpers import grown_run

PROMPTS = ["the", "the quick brown fox jumps over", "dog and the other"]
GREEDY = Sampling(max_new_tokens=12, temperature=0.0)


@cache
def opened() -> OpenModel:
    return open_model(grown_run.checkpoints())


def texts(found: list[Continuation]) -> list[str]:
    return [one.text for one in found]


def test_a_checkpoint_continues_like_its_export() -> None:
    found = list(generate(opened(), PROMPTS, GREEDY))
    assert [one.prompt for one in found] == PROMPTS and all(texts(found))
    assert found == list(generate(open_model(grown_run.export()), PROMPTS, GREEDY))


def test_unequal_prompts_in_a_batch_continue_as_alone() -> None:
    together = list(generate(opened(), PROMPTS, GREEDY, batch_size=3))
    assert together == list(generate(opened(), PROMPTS, GREEDY, batch_size=1))


def test_greedy_takes_the_most_likely_token() -> None:
    (found,) = generate(opened(), PROMPTS[1:2], GREEDY)
    ids = opened().tokenizer(PROMPTS[1])["input_ids"]
    for token in found.tokens:
        with torch.no_grad():
            expected = int(opened().model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        assert token == expected
        ids = [*ids, token]
    whole = opened().tokenizer.decode(ids, skip_special_tokens=True)
    assert whole == PROMPTS[1] + found.text


def test_samples_depend_on_the_seed_alone() -> None:
    def sample(seed: int) -> list[str]:
        return texts(list(generate(opened(), PROMPTS, Sampling(12, 1.0, num_samples=2, seed=seed))))

    one = sample(1)
    assert len(one) == 6 and one == sample(1) != sample(2)
    assert len(set(one[:2])) == 2


def test_sampling_is_limited_to_the_likely_tokens() -> None:
    greedy = list(generate(opened(), PROMPTS, GREEDY))
    for narrow in (Sampling(12, 1.0, top_k=1), Sampling(12, 1.0, top_p=1e-6), Sampling(12, 1e-4)):
        assert list(generate(opened(), PROMPTS, narrow)) == greedy


def test_the_end_of_a_text_ends_it() -> None:
    (whole,) = generate(opened(), PROMPTS[:1], GREEDY)
    end = whole.tokens[4]
    before = opened().model.generation_config.eos_token_id
    opened().model.generation_config.eos_token_id = end
    try:
        (cut,) = generate(opened(), PROMPTS[:1], GREEDY)
    finally:
        opened().model.generation_config.eos_token_id = before
    assert cut.ended and cut.tokens == whole.tokens[: whole.tokens.index(end)] and not whole.ended


def test_an_empty_prompt_is_the_beginning_of_a_document() -> None:
    """Where documents have no BOS, the end of the one before is what the model saw there in training."""
    (found, blank) = generate(opened(), ["", "the"], GREEDY)
    model, end = opened().model, opened().tokenizer.eos_token_id
    assert model.generation_config.bos_token_id == end != opened().tokenizer.bos_token_id
    alone = model.generate(max_new_tokens=12, do_sample=False)[0].tolist()
    assert alone[0] == end and alone[1 : len(found.tokens) + 1] == list(found.tokens)
    assert blank.prompt == "the"
    export = open_model(grown_run.export())
    assert list(generate(export, [""], GREEDY)) == [found]
    assert export.model.generate(max_new_tokens=12, do_sample=False)[0].tolist() == alone


def test_an_empty_prompt_needs_a_token_to_begin_with() -> None:
    settings = opened().model.generation_config
    before = settings.bos_token_id
    nothing = replace(opened(), tokenizer=Bare())
    settings.bos_token_id = settings.eos_token_id = None
    try:
        with pytest.raises(DataError, match="no token that begins or ends a document"):
            list(generate(nothing, [""], GREEDY))
    finally:
        settings.bos_token_id = settings.eos_token_id = before


class Bare:
    """A tokenizer without special tokens."""

    eos_token_id = None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": []}


@pytest.mark.parametrize(
    ("prompts", "sampling", "says"),
    [
        ([], GREEDY, "no prompts"),
        (["the dog " * 30], GREEDY, "is longer than the 48"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts: list[str], sampling: Sampling, says: str) -> None:
    with pytest.raises(DataError, match=says):
        list(generate(opened(), prompts, sampling))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=-1.0), Sampling(top_p=0.0), Sampling(top_p=1.5), Sampling(top_k=-1),
        Sampling(temperature=0.0, num_samples=2),
    ],
)  # fmt: skip
def test_sampling_out_of_range(sampling: Sampling) -> None:
    with pytest.raises(ConfigError):
        sampling.check()
