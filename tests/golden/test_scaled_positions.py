"""Scaled rotary positions through all of training: the reference's trajectory, ordinary and looped passes alike.

`make test-all` also takes the fused operations, which tests/ops holds against autograd with scaled tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.golden.test_fused_trajectory import check
from tests.helpers.trajectories import make_trajectory, settings_of, write_trajectory
from tests.helpers.trajectory_runs import check_trajectory

LLAMA3 = {
    "type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
MORE_PASSES = {"micro_batch_size": 2, "recompute_granularity": "full"}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 2.0}


def write(path: Path, scaling: dict[str, Any], seed: int) -> Path:
    """Sequences of four times the context before the scaling; two selections, a second loop, the end in a window."""
    settings = settings_of("depth2_cosine")
    settings |= {"steps": 14, "model": {**settings["model"], "rope_theta": 100.0, "rotary_scaling": scaling}}
    write_trajectory(path, *make_trajectory(settings, seed))
    return path


@pytest.fixture(scope="module")
def yarn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("yarn") / "a.safetensors", YARN, 0)


@pytest.mark.exhaustive
def test_fused_loops(yarn: Path) -> None:
    """Yarn multiplies cos and sin: the backward of the fused loops must not take that for a rotation."""
    check(yarn, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "loop_method": "balanced"}, MORE_PASSES)


@pytest.mark.exhaustive
def test_fused_rotary(yarn: Path) -> None:
    check_trajectory(yarn, fusions="on")


def test_yarn(yarn: Path) -> None:
    check_trajectory(yarn)


def test_llama3(tmp_path: Path) -> None:
    check_trajectory(write(tmp_path / "a.safetensors", LLAMA3, 0), 2, {"tensor_model_parallel_size": 2})
