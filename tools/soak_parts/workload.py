"""The run that is soaked: small, quick, with dropout and growth."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_sgt.config import Config, parse_config
from megatron_sgt.data.encoding import EncodedKey
from megatron_sgt.data.writer import DatasetWriter

STEPS, INTERVAL = 160, 4
LEASE_TIMEOUT = 5.0
"""Seconds without a sign of life after which another start takes the run over."""
LAYOUTS = {
    f"{name}-zero{stage}": {**sizes, "zero_stage": stage, "device": "cpu"}
    for name, sizes, stages in (
        ("tp2", {"tensor_model_parallel_size": 2}, (0, 1, 2, 3)),
        ("dp2", {}, (0, 1, 2, 3)),
        ("pp2", {"pipeline_model_parallel_size": 2}, (0, 1, 2)),
    )
    for stage in stages
}
SAVES = {"sync": {"async_save": False}, "async": {"async_save": True}}


def small_config(
    run_dir: Path, data: str, parallel: dict[str, Any], checkpoint: dict[str, Any], steps: int = STEPS
) -> Config:
    """A run of quick steps that grows twice."""
    return parse_config(
        {
            "model": {
                "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96, "seq_length": 16,
                "vocab_size": 64, "make_vocab_size_divisible_by": 16, "hidden_dropout": 0.1,
            },
            "growth": {"first_selection_step": 8, "window_size": 12, "num_keep_heads": 2, "max_selected_layers": 2},
            "optim": {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 5},
            "parallel": parallel,
            # Keeps ZeRO where there is one data-parallel rank (Config.zero_stage_on).
            "deepspeed": {"zero_optimization": {"stage": parallel["zero_stage"]}},
            "train": {"train_iters": steps, "micro_batch_size": 2, "global_batch_size": 4},
            "data": {"data_path": [data], "data_cache_path": f"{data}_cache", "split": "1,0,0"},
            "checkpoint": {"writer_timeout_seconds": LEASE_TIMEOUT, **checkpoint},
            "logging": {"run_dir": str(run_dir), "log_interval": 1, "progress_bar": "off"},
        }
    )  # fmt: skip


def write_data(folder: Path) -> str:
    """A data set of random tokens; returns its prefix."""
    prefix, rng = str(folder / "tokens"), np.random.default_rng(1)
    with DatasetWriter(prefix, "uint16", overwrite=False) as writer:
        writer.add(EncodedKey(rng.integers(64, size=20000).astype(np.uint16), np.full(400, 50, np.int32), 0))
        writer.commit({})
    return prefix
