"""How a pipeline cuts the model."""

from megatron_sgt.config import parse_config
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.planning.pipeline import pipeline_layout
from tests.helpers.runs import TINY


def test_without_a_pipeline_one_stage_has_all() -> None:
    config = parse_config({**TINY, "model": {**TINY["model"], "vocab_size": 64}})
    assert pipeline_layout(config) == PipelineLayout(1, (config.model.num_layers,))
