"""Lines that say what a run is."""

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.planning.describe import batch_line, growth_line, layout_line, model_line
from megatron_sgt.planning.parameters import parameter_count
from tests.helpers.single import small_config


def test_model_layout_and_batch() -> None:
    config = small_config(parallel={"tensor_model_parallel_size": 2}, train={"global_batch_size": 12})
    assert model_line(config).startswith(
        f"{parameter_count(config.model):,} parameters · 4 layers · hidden 64"
    )
    assert layout_line(config, 4, "bf16") == "4 ranks = tensor parallel 2 x data parallel 2 · ZeRO-1 · bf16"
    assert batch_line(config, 4) == (
        "12 sequences = micro 2 x accumulation 3 x data parallel 2 · 384 tokens per step"
    )
    with pytest.raises(ConfigError, match="nearest that work: 8"):
        batch_line(config, 8)


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
