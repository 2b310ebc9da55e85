"""Derived shapes of the model, its rules, and the padding of the vocabulary."""

import re
from typing import Any

import pytest
from pydantic import ValidationError

from megatron_sgt.config import ModelConfig
from megatron_sgt.errors import ConfigError

MODEL: dict[str, Any] = {"num_layers": 2, "hidden_size": 96, "num_attention_heads": 4, "seq_length": 16}


@pytest.mark.parametrize(
    ("given", "field", "expected"),
    [
        ({}, "ffn_hidden_size", 256),  # 8/3 x 96 is already a multiple of 64
        ({"hidden_size": 104}, "ffn_hidden_size", 320),  # 277.3 up to the next multiple of 64
        ({"hidden_size": 4096, "num_attention_heads": 32}, "ffn_hidden_size", 10944),
        ({"activation": "gelu"}, "ffn_hidden_size", 384),
        ({"ffn_hidden_size": 100}, "ffn_hidden_size", 100),
        ({"ffn_hidden_size": None}, "ffn_hidden_size", 256),
        ({}, "num_query_groups", 4),
        ({"num_query_groups": 2}, "num_query_groups", 2),
        ({}, "kv_channels", 24),
        ({"kv_channels": 32}, "kv_channels", 32),
        ({"hidden_size": 97, "kv_channels": 8}, "kv_channels", 8),
    ],
)
def test_derived_fields(given: dict[str, Any], field: str, expected: int) -> None:
    assert getattr(ModelConfig(**{**MODEL, **given}), field) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden_size": 97}, "hidden_size 97 is not a multiple of num_attention_heads 4"),
        ({"num_query_groups": 3}, "num_attention_heads 4 is not a multiple of num_query_groups 3"),
        ({"kv_channels": 5}, "kv_channels: must be even for the rotary embedding, got 5"),
    ],
)
def test_rules(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        ModelConfig(**{**MODEL, **given})


@pytest.mark.parametrize("field", ["hidden_size", "num_attention_heads"])
def test_a_bad_field_is_the_only_problem_even_if_others_derive_from_it(field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**{**MODEL, field: -1})
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


@pytest.mark.parametrize(
    ("own", "tokenizer", "expected"), [(256, None, 256), (257, None, 384), (None, 1, 128), (500, 300, 384)]
)
def test_padded_vocabulary(own: int | None, tokenizer: int | None, expected: int) -> None:
    assert ModelConfig(**MODEL, vocab_size=own).padded_vocab_size(tokenizer) == expected


def test_padded_vocabulary_of_an_unknown_one() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        ModelConfig(**MODEL).padded_vocab_size()
