"""Lines that say what a run is."""

import pytest

from megatron_sgt.planning.describe import growth_line, model_line, stages_line
from megatron_sgt.planning.parameters import parameter_count
from megatron_sgt.stages.stages import stages_of
from tests.helpers.single import small_config


def test_model() -> None:
    config = small_config()
    assert model_line(config).startswith(f"{parameter_count(config.model):,} parameters · 4 layers · hidden 64")


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
