"""The rules between sections: what pipelines, norms over all heads and new runs do not go with (more: test_root.py)."""

from typing import Any

import pytest

from megatron_sgt.config import parse_config
from megatron_sgt.errors import ConfigError
from tests.helpers.runs import TINY


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"pipeline_model_parallel_layout": "Et|tL"}, "has no effect with pipeline_model_parallel_size 1"),
        ({"pipeline_model_parallel_size": 99}, "pipeline_model_parallel_size: 99 needs a layer for each part"),
        (
            {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "1,9"},
            r"pipeline_model_parallel_layout: '1,9': its parts hold 1 \+ 9 = 10 layers",
        ),
    ],
)
def test_a_pipeline_that_does_not_fit(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({**TINY, "model": {**TINY["model"], "vocab_size": 64}, "parallel": given})


@pytest.mark.parametrize(
    ("model", "parallel", "says"),
    [
        ({"qk_layernorm_over": "all"}, {}, r"model\.qk_layernorm_over: all has no effect with qk_layernorm false"),
        (
            {"qk_layernorm": True, "qk_layernorm_over": "all"},
            {"tensor_model_parallel_size": 2, "loop_method": "balanced"},
            r"parallel\.loop_method: balanced .* model\.qk_layernorm_over all .* use owner",
        ),
    ],
)
def test_norms_over_all_heads(model: dict[str, Any], parallel: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({**TINY, "model": {**TINY["model"], "vocab_size": 64, **model}, "parallel": parallel})


@pytest.mark.parametrize(
    ("checkpoint", "says"),
    [
        ({"start": "weights"}, r"checkpoint\.start: weights needs checkpoint\.load"),
        ({"growth": "keep"}, r"checkpoint\.growth: keep has no effect with checkpoint\.start resume"),
        ({"load": "somewhere", "growth": "restart"}, r"checkpoint\.growth: restart has no effect"),
        ({"weights": "ema"}, r"checkpoint\.weights: ema has no effect with checkpoint\.start resume"),
    ],
)
def test_what_a_new_run_begins_with(checkpoint: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse_config({**TINY, "checkpoint": checkpoint})
    parse_config({**TINY, "checkpoint": {**checkpoint, "load": "somewhere", "start": "weights"}})


def test_a_validation_at_the_start_of_a_run_that_has_none() -> None:
    train = {**TINY["train"], "eval_interval": 0, "eval_at_start": True}
    with pytest.raises(ConfigError, match=r"train\.eval_at_start: has no effect with train\.eval_interval 0"):
        parse_config({**TINY, "train": train})


def test_tasks_without_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.tasks: tasks are text, but data\.tokenizer is null"):
        parse_config({**TINY, "evaluation": {"tasks": ["words"]}})


def test_documents_whose_entropy_counts_fit_a_sequence() -> None:
    values = {**TINY, "model": {**TINY["model"], "vocab_size": 64}}
    values["growth"] = {**TINY.get("growth", {}), "entropy_min_document_tokens": TINY["model"]["seq_length"] + 1}
    parse_config(values)
    with pytest.raises(
        ConfigError, match=r"growth\.entropy_min_document_tokens: no document in a sequence of model\.se"
    ):
        parse_config({**values, "data": {**TINY.get("data", {}), "reset_attention_mask": True}})
