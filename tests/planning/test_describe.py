"""Lines that say what a run is."""

import pytest

from megatron_sgt.planning.describe import cut_line, growth_line, model_line, pipeline_lines, stages_line
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.stages.stages import stages_of
from tests.helpers.single import small_config


def test_model() -> None:
    config = small_config()
    assert model_line(config).startswith(f"{parameter_count(config.model):,} parameters · 4 layers · hidden 64")
    scaling = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16}
    scaled = model_line(small_config(model={"rotary_scaling": scaling}))
    assert scaled == f"{model_line(config)} · rotary yarn, factor 4 of 16 tokens"


@pytest.mark.parametrize(
    ("growth", "text"),
    [
        ({"method": "vanilla"}, "none (vanilla)"),
        ({"method": "block_loop", "block_loop_layers": [1, 2]}, "block loop of layers [1, 2]: +"),
        ({"max_loop_depth": 1}, "up to 3 layers x 2 heads x 1 loop from step 250 on, at most +"),
        ({"head_choice": "all"}, "x all heads x 2 loops"),
    ],
)
def test_growth(growth: dict, text: str) -> None:
    assert text in growth_line(small_config(growth=growth))


def test_stages() -> None:
    config = small_config(growth={"stages": [{"until_steps": 3, "operator": "g_stack", "options": {"factor": 2}}]})
    line = stages_line(stages_of(config))
    assert line.startswith("4 layers, ") and "parameters · g_stack after step 3: 8 layers, " in line


def test_the_cut_of_each_stage_of_the_run() -> None:
    assert pipeline_lines(stages_of(small_config()), 1) == []
    batch = {"micro_batch_size": 1, "global_batch_size": 2}
    pipeline = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "3,1"}
    (line,) = pipeline_lines(stages_of(small_config(train=batch, parallel=pipeline, growth={"method": "vanilla"})), 2)
    assert line.startswith("3,1 layers · largest stage over the mean +") and "(even cut: +" in line
    assert "growth" not in line and line.endswith("bubble of equal stages 33.3 % of a step (2 micro-batches)")
    (line,) = pipeline_lines(stages_of(small_config(train=batch, parallel=pipeline)), 2)
    assert " % now, +" in line and " % after growth (even cut: +" in line
    growth = {"stages": [{"until_steps": 3, "operator": "g_stack", "options": {"factor": 2}}]}
    chunks = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}
    lines = pipeline_lines(stages_of(small_config(train=batch, parallel=chunks, growth=growth)), 2)
    assert lines[0].startswith("growth stage 0 (4 layers): 2,2 layers in chunks of 1,1,1,1 · ")
    assert "(as the even cut)" in lines[0]
    assert lines[1].startswith("growth stage 1 (8 layers): ")
    assert "bubble of equal stages 20.0 % of a step (2 micro-batches) · growth lengthens a step by " in lines[1]


def test_the_bubble_of_equal_stages_is_the_whole_one() -> None:
    cut = {
        "layers": [2, 2], "layout": "2,2", "chunks": 1, "imbalance": {"now": 0.0001}, "growth": 0.0,
        "even": {"layout": "2,2", "imbalance": {"now": 0.0001}, "growth": 0.0}, "micro_batches": 1, "bubble": 0.5,
    }  # fmt: skip
    assert cut_line(cut).endswith("mean +0.0 % (as the even cut) · bubble 50.0 % of a step (1 micro-batch)")
