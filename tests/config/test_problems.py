"""Pydantic's errors in the user's words. The values come as YAML, the way a user writes them."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_sgt.config import Config
from megatron_sgt.config.problems import explain
from megatron_sgt.config.yaml_io import parse_yaml


def explained(*changes: str) -> list[str]:
    """Return the lines about a small configuration with some values changed, each `section.key=YAML`."""
    values: dict[str, Any] = {
        "model": {
            "num_layers": 6,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "seq_length": 64,
            "vocab_size": 256,
        },
        "optim": {"lr": 6e-4},
        "train": {"train_iters": 100, "micro_batch_size": 2, "global_batch_size": 8},
    }
    for change in changes:
        name, _, text = change.partition("=")
        section, _, key = name.partition(".")
        value = parse_yaml(text, "test")
        values[section] = {**values.get(section, {}), key: value} if key else value
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(values)
    return explain(caught.value, Config)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.hidden_size=-3", "model.hidden_size: must be > 0, got -3"),
        ("model.hidden_size=true", "model.hidden_size: must be an integer, got true"),
        ("model.hidden_size=1.5", "model.hidden_size: must be an integer, got 1.5"),
        ("model.hidden_size=", "model.hidden_size: must be an integer, got null"),
        ("optim.lr=fast", "optim.lr: must be a number, got 'fast'"),
        ("optim.lr=.nan", "optim.lr: must be a finite number, got nan"),
        ("growth.ema_decay=1", "growth.ema_decay: must be < 1, got 1"),
        ("train.seed=-1", "train.seed: must be >= 0, got -1"),
        ("growth.entropy_after_fixed=yes", "growth.entropy_after_fixed: must be true or false, got 'yes'"),
        ("growth.exclude_layers=3", "growth.exclude_layers: must be a list, got 3"),
        ("growth.exclude_layers=[0, x]", "growth.exclude_layers[1]: must be an integer, got 'x'"),
        ("data.tokenizer=gpt2", "data.tokenizer: must be a mapping, got 'gpt2'"),
        (
            "data.tokenizer={type: bpe, model: x}",
            "data.tokenizer.type: must be 'sentencepiece' or 'huggingface', got 'bpe'",
        ),
        ("data.tokenizer={model: x}", "data.tokenizer.type: is required"),
        ("logging.run_dir=", "logging.run_dir: must be text, got null"),
        ("logging.run_dir=''", "logging.run_dir: must not be empty, got ''"),
        ("growth.decay_type=liner", "got 'liner'; did you mean 'linear'?"),
        ("parallel.zero_stage=5", "parallel.zero_stage: must be 0, 1, 2 or 3, got 5"),
        ("deepspeed=[1]", "deepspeed: must be a mapping, got [1]"),
        ("model.kv_channels=7", "model.kv_channels: must be even"),
        (
            "model.num_attention_heads=7",
            "model.kv_channels: hidden_size 64 is not a multiple of num_attention_heads 7",
        ),
    ],
)
def test_a_bad_value_is_one_line(override: str, line: str) -> None:
    (found,) = explained(override)
    assert line in found


def test_problems_come_in_the_order_of_the_fields() -> None:
    assert explained("train.n_layers=1", "model.hidden_size=0", "optim.min_lr=1", "growth.window_size=x") == [
        "model.hidden_size: must be > 0, got 0",
        "growth.window_size: must be an integer, got 'x'",
        "optim.min_lr: 1 is above lr 0.0006",
        "unknown key 'train.n_layers'; did you mean 'model.num_layers'?",
    ]


def test_rules_between_sections_stand_under_their_own_names() -> None:
    assert [line.partition(":")[0] for line in explained("growth.num_keep_heads=5", "growth.top_k_layers=6")] == [
        "growth.num_keep_heads",
        "growth.top_k_layers",
    ]
