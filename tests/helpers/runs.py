"""Tiny pretraining runs: their data, their settings, and what they leave behind."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sgt.config import Config, parse_config
from megatron_sgt.data.encoding import EncodedKey
from megatron_sgt.data.writer import DatasetWriter
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.metrics import METRICS_FILE
from megatron_sgt.metrics.records import MEASURED

VOCAB_SIZE = 64

TINY: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 5, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 48,
        "seq_length": 16, "vocab_size": VOCAB_SIZE, "make_vocab_size_divisible_by": 16,
        "init_method_std": 0.2,
    },
    "growth": {
        "first_selection_step": 3, "window_size": 3, "num_keep_heads": 2, "max_loop_depth": 2,
        "top_k_layers": 3, "max_selected_layers": 2,
    },
    "optim": {"lr": 3e-3, "min_lr": 3e-4, "lr_warmup_iters": 3},
    "parallel": {"device": "cpu"},
    "train": {
        "train_iters": 18, "micro_batch_size": 2, "global_batch_size": 8, "eval_interval": 5, "eval_iters": 1,
    },
    "data": {"split": "90,10,0"},
    "logging": {"log_interval": 1, "progress_bar": "off"},
}  # fmt: skip
"""Decisions at steps 3, 6, 9, 12 and 15: two layers, each looped twice where it stays in the top 3."""


def write_tiny_data(folder: Path, seed: int = 5) -> str:
    """A data set of random walks over VOCAB_SIZE tokens; returns its prefix."""
    rng = random.Random(seed)
    tokens, lengths = [], []
    for _ in range(120):
        token = rng.randrange(VOCAB_SIZE)
        lengths.append(rng.randint(20, 60))
        for _ in range(lengths[-1]):
            token = (3 * token + rng.choice((1, 2, 5))) % VOCAB_SIZE
            tokens.append(token)
    prefix = folder / "walks"
    with DatasetWriter(str(prefix), "uint16", overwrite=False) as writer:
        writer.add(EncodedKey(np.array(tokens, np.uint16), np.array(lengths, np.int32), 0))
        writer.commit({})
    return str(prefix)


def tiny_config(
    run_dir: Path, data: str, /, phases: Sequence[dict[str, Any]] = (), **sections: dict[str, Any]
) -> Config:
    """TINY on ``data``, writing to ``run_dir``, with the given values per section on top."""
    data_section = {"data_path": [data], "data_cache_path": f"{data}_cache"}
    ours: dict[str, dict[str, Any]] = {"data": data_section, "logging": {"run_dir": str(run_dir)}}
    names = {*TINY, *ours, *sections}
    merged = {name: {**TINY.get(name, {}), **ours.get(name, {}), **sections.get(name, {})} for name in names}
    return parse_config({**merged, "phases": list(phases)})


def pretrain(info: RankInfo, config: Config) -> None:
    """Train to the end; for ``run_on_ranks``."""
    PretrainingRun(config, info).train()


def measured_steps(run_dir: Path) -> list[dict[str, Any]]:
    """What every step measured, in order; times left out."""
    records = read_metrics(run_dir / METRICS_FILE)
    return [{name: record.get(name) for name in ("step", *MEASURED)} for record in records if record["kind"] == "train"]


def reported(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind, times left out."""
    records = read_metrics(run_dir / METRICS_FILE)
    return [
        {k: v for k, v in record.items() if k not in ("time", "seconds")}
        for record in records
        if record["kind"] == kind
    ]


def checkpoint_leaves(folder: Path) -> dict[str, Any]:
    """Every tensor, number and text in the .pt files of a checkpoint, by file and path within it."""
    leaves: dict[str, Any] = {}
    for file in sorted(folder.glob("*.pt")):
        _flatten(file.name, torch.load(file, map_location="cpu", weights_only=False), leaves)
    return leaves


def _flatten(path: str, value: Any, leaves: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(f"{path}/{key}", item, leaves)
    elif type(value).__module__.startswith("deepspeed.") and hasattr(value, "__dict__"):
        _flatten(path, vars(value), leaves)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _flatten(f"{path}/{index}", item, leaves)
    else:
        leaves[path] = value


def differing_leaves(one: Path, other: Path) -> list[str]:
    """Names of the leaves in which two checkpoints differ in a single bit, or that only one of them has."""
    left, right = checkpoint_leaves(one), checkpoint_leaves(other)
    return sorted(name for name in left.keys() | right.keys() if not _equal(left.get(name), right.get(name)))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return type(one) is type(other) and one == other
