"""A run on packed documents, cut shorter at first: the same in another layout, and measured alike afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config
from megatron_sgt.export.evaluate import evaluate, which_samples
from megatron_sgt.export.hf.open_model import open_model
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.metrics import METRICS_FILE
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, tiny_config, write_tiny_data

SHARED = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "loop_method": "balanced"}
STAGES = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "2,3"}


def packed(run_dir: Path, data: str, micro: int, **parallel: Any) -> Config:
    """Documents of 20 to 60 tokens in sequences of 48, of which each is two of 24 until step 4."""
    return tiny_config(
        run_dir,
        data,
        model={"seq_length": 48},
        growth={"entropy_min_document_tokens": 4},
        parallel=parallel,
        train={"train_iters": 8, "micro_batch_size": micro, "eval_interval": 8},
        data={
            "data_path": [data], "data_cache_path": f"{data}_cache", "packing": "best_fit",
            "reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True,
            "seq_length_curriculum": [{"until_steps": 4, "seq_length": 24}],
        },
    )  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.parametrize("parallel", [SHARED, STAGES, {"zero_stage": 3}], ids=["shared", "stages", "replicas"])
def test_a_run_on_packed_documents(parallel: dict[str, Any], tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)
    alone, other = packed(tmp_path / "alone", data, 4), packed(tmp_path / "other", data, 2, **parallel)
    run_on_ranks(1, pretrain, alone)
    run_on_ranks(2, pretrain, other, backend="gloo")
    one, two = (measured_steps(Path(config.logging.run_dir)) for config in (alone, other))
    assert len(one) == len(two) == 8
    for expected, found in zip(one, two, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert found["loop_depth"] == expected["loop_depth"]
    assert one[-1]["loop_depth"] != one[0]["loop_depth"], "nothing has grown"
    logged = [r for r in read_metrics(Path(alone.logging.run_dir) / METRICS_FILE) if r["kind"] == "valid"][-1]["loss"]
    opened = open_model(Path(alone.save_dir), keep_padding=True)
    measured = evaluate(opened, which_samples(opened, (), None, None, None, None), None, 4)
    assert (measured.padded_loss or measured.loss) == pytest.approx(logged, abs=1e-5)
    assert measured.tokens < measured.samples * 48, "padding and ends of documents do not count"
