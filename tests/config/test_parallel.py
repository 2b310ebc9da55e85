"""The rules inside the section of the parallel layout."""

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from megatron_sgt.config import ParallelConfig
from megatron_sgt.config.yaml_io import dump_yaml


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pipeline_model_parallel_size": 2, "zero_stage": 3}, "zero_stage: 3 with pipeline_model_parallel_size 2"),
        ({"virtual_pipeline_model_parallel_size": 2}, "needs pipeline_model_parallel_size above 1, got 1"),
        ({"context_parallel_size": 4}, "context_parallel_size: 4 is not supported, only 1"),
        ({"tensor_model_parallel_size": 0}, "tensor_model_parallel_size"),
        ({"zero_stage": 4}, "zero_stage"),
        ({"device": "tpu"}, "device"),
        ({"distributed_timeout_minutes": 0}, "distributed_timeout_minutes"),
    ],
)
def test_rules(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ParallelConfig(**given)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_zero_stages(stage: Any) -> None:
    assert ParallelConfig(zero_stage=stage).zero_stage == stage


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("auto", "auto"),
        ("Et*3|(t)*2|tL", "Et*3|(t)*2|tL"),
        ("[3, 2, 1]", (3, 2, 1)),
        ("'3,2,1'", "3,2,1"),
        ("[[embedding, decoder], [decoder, loss]]", (("embedding", "decoder"), ("decoder", "loss"))),
    ],
)
def test_a_layout_from_yaml_and_back(given: str, kept: Any) -> None:
    """As a run writes its configuration, and a Slurm job reads it."""
    config = ParallelConfig.model_validate(yaml.safe_load(f"pipeline_model_parallel_layout: {given}"))
    assert config.pipeline_model_parallel_layout == kept
    assert ParallelConfig.model_validate(yaml.safe_load(dump_yaml(config.model_dump()))) == config
