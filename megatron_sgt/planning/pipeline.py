"""How a pipeline cuts the model: the stages that a run has, and what the cut costs. Pure."""

from __future__ import annotations

from megatron_sgt.config import Config
from megatron_sgt.config.pipeline import AUTO, PipelineLayout, even_layout, parse_layout


def pipeline_layout(config: Config) -> PipelineLayout:
    """Which layers each stage of a run of ``config`` holds: one stage with all of them without a pipeline."""
    parallel, num_layers = config.parallel, config.model.num_layers
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    setting = parallel.pipeline_model_parallel_layout
    if stages == 1:
        return PipelineLayout(1, (num_layers,))
    if setting == AUTO:
        return even_layout(stages, virtual, num_layers)
    return parse_layout(setting, stages, virtual, num_layers)
