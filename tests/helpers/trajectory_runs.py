"""Trajectory files repeated on ranks, and what they differ in from the recorded values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trajectory_parts import run as rp

from megatron_sgt.engine.build import start_processes
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.ranks import SHARED_MEMORY, run_on_ranks
from tests.helpers.trajectories import read_trajectory

ALLOWED = {
    "loss": 3e-5,
    "ema_entropy": 3e-5,
    "head_decay": 1e-5,
    "grad_norm": 1e-3,
    "final weights": 5e-4,
    "probe_logits": 1e-3,
}
"""Largest absolute differences that count as fp32 noise (tests/golden/README.md; the gradient norm, which no
requirement names, is the most sensitive to the drift of the weights)."""

EVENT_FIELDS = ("step", "action", "layer", "phase", "kept_heads")


ZERO: dict[int, dict[str, Any]] = {
    1: {"overlap_comm": True, "reduce_bucket_size": 60_000},
    2: {"overlap_comm": True, "reduce_bucket_size": 60_000},
    3: {"overlap_comm": True, "stage3_param_persistence_threshold": 0},
}
"""A tiny model hides what ZeRO does: by default its gradients fit into one bucket, and stage 3 spreads no weight."""


def _zero(layout: dict[str, Any]) -> dict[str, Any]:
    options = ZERO.get(layout.get("zero_stage", 1), {})
    if layout.get("virtual_pipeline_model_parallel_size", 1) == 1:
        return options
    # DeepSpeed could not overlap it; ZeRO on one data-parallel rank needs some option.
    return {"reduce_bucket_size": 60_000} if options else {}


def trajectory_on(info: RankInfo, path: Path, layout: dict[str, Any], train: dict[str, Any]) -> Any:
    """Repeat ``path`` on this rank; rank 0 returns (tensors, metadata). For ``run_on_ranks``."""
    tensors, meta = rp.read_trajectory(path)
    overrides = {
        "parallel": {"device": "cpu", **layout},
        "train": {**train, "threads_per_rank": 1},
        "deepspeed": {"zero_optimization": _zero(layout)},
    }
    config = rp.trajectory_config(tensors, meta, overrides)
    groups = start_processes(config, info)
    result = rp.repeat(config, groups, rp.inputs_of(tensors), meta)
    return result if groups.is_main else None


def run_trajectory(
    path: Path,
    world_size: int = 1,
    layout: dict[str, Any] | None = None,
    backend: str = SHARED_MEMORY,
    **train: Any,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, metadata) that the project makes of ``path`` on ``world_size`` ranks.

    backend: see ``run_on_ranks``.
    """
    return run_on_ranks(world_size, trajectory_on, path, layout or {}, train, timeout=400, backend=backend)[0]


def differences(result: dict[str, Tensor], recorded: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference per quantity of ``ALLOWED``; infinite where shapes differ."""

    def worst(name: str) -> float:
        one, other = result[name], recorded[name]
        if one.shape != other.shape:
            return float("inf")
        gap = (one.double() - other.double()).abs().max()
        return float(gap.nan_to_num(nan=float("inf")))

    weights = [name for name in recorded if name.startswith("final/")]
    named = {name: worst(name) for name in ALLOWED if name != "final weights"}
    return {**named, "final weights": max(worst(name) for name in weights)}


def structure(meta: dict[str, Any]) -> list[dict[str, Any]]:
    """The events as the golden file records them."""
    return [
        {
            **{name: event[name] for name in EVENT_FIELDS},
            "kept_heads": {int(n): list(heads) for n, heads in event["kept_heads"].items()},
        }
        for event in meta["events"]
    ]


def check_trajectory(
    path: Path,
    world_size: int = 1,
    layout: dict[str, Any] | None = None,
    backend: str = SHARED_MEMORY,
    **train: Any,
) -> None:
    """Repeat and assert: every event, every loop depth, every number within ``ALLOWED`` at every step."""
    recorded, recorded_meta = read_trajectory(path)
    result, meta = run_trajectory(path, world_size, layout, backend, **train)
    measured = differences(result, recorded)
    print("  ".join(f"{name} {value:.1e}" for name, value in measured.items()))  # shown when a test fails
    assert structure(meta) == structure(recorded_meta)
    assert torch.equal(result["loop_depth"].long(), recorded["loop_depth"].long())
    beyond = {name: value for name, value in measured.items() if not value <= ALLOWED[name]}
    assert not beyond, f"beyond fp32 noise: {beyond}; allowed {ALLOWED}"
