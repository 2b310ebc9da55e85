"""How ranks share a model and a batch."""

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.planning.layout import batch_line, layout_line
from tests.helpers.single import small_config


def test_layout_and_batch() -> None:
    config = small_config(parallel={"tensor_model_parallel_size": 2}, train={"global_batch_size": 12})
    assert layout_line(config, 4, "bf16") == "4 ranks = tensor parallel 2 x data parallel 2 · ZeRO-1 · bf16"
    staged = small_config(parallel={"pipeline_model_parallel_size": 2})
    assert layout_line(staged, 4, "bf16") == (
        "4 ranks = tensor parallel 1 x pipeline parallel 2 x data parallel 2 · ZeRO-1 · bf16"
    )
    chunks = small_config(parallel={"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2})
    assert "pipeline parallel 2 (2 chunks each) x data" in layout_line(chunks, 4, "bf16")
    assert batch_line(config, 4) == ("12 sequences = micro 2 x accumulation 3 x data parallel 2 · 384 tokens per step")
    with pytest.raises(ConfigError, match="nearest that work: 8"):
        batch_line(config, 8)
