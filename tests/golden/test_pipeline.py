"""The golden trajectory through a pipeline: the same losses, gradient norms, entropies, weights and growth events.

`make test` takes a share of the layouts; `make test-all` takes all of them.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.exhaustive import share_of
from tests.helpers.trajectories import GOLDEN, make_trajectory, read_trajectory, settings_of, write_trajectory
from tests.helpers.trajectory_runs import ALLOWED, differences, run_trajectory, structure

EVERY = [
    # stages, parts of each, layout, tensor parallel, data parallel, ZeRO, recompute
    (2, 1, "auto", 1, 1, 0, "none"),
    (2, 1, "auto", 1, 1, 1, "none"),
    (2, 1, "4,2", 1, 1, 2, "full"),
    (4, 1, "1,2,2,1", 1, 1, 1, "none"),
    (4, 1, "1,2,2,1", 1, 1, 2, "selective"),
    (2, 1, "auto", 2, 1, 1, "none"),
    (2, 1, "auto", 1, 2, 0, "none"),
    (2, 1, "auto", 1, 2, 1, "none"),
    (2, 1, "auto", 1, 2, 2, "full"),
    (2, 2, "auto", 1, 1, 0, "full"),
    (2, 2, "Et|tt|tt|tL", 1, 1, 2, "none"),
    (2, 2, "auto", 2, 1, 1, "none"),
    (2, 2, "auto", 1, 2, 2, "none"),
]
SHARE = [EVERY[2], EVERY[10]]


@pytest.mark.parametrize(("stages", "virtual", "layout", "tensor", "data", "zero", "recompute"), share_of(EVERY, SHARE))
def test_golden(stages: int, virtual: int, layout: str, tensor: int, data: int, zero: int, recompute: str) -> None:
    parallel: dict[str, Any] = {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual,
        "pipeline_model_parallel_layout": layout,
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "zero_stage": zero,
    }
    train = {"recompute_granularity": recompute, "micro_batch_size": 2 // data}
    check(GOLDEN, stages * tensor * data, parallel, train)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers with tied embeddings: two parts on each of four stages."""
    settings = {**settings_of("wide_heads_tied"), "steps": 14}
    settings["model"] |= {"num_layers": 8}
    path = tmp_path_factory.mktemp("deep") / "deep.safetensors"
    write_trajectory(path, *make_trajectory(settings, seed=0))
    return path


@pytest.mark.exhaustive
@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize(("stages", "virtual"), [(4, 2), (2, 4), (4, 1)])
def test_deep_and_tied(stages: int, virtual: int, zero: int, deep: Path) -> None:
    parallel = {
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": virtual,
        "zero_stage": zero,
    }
    check(deep, stages, parallel, {"micro_batch_size": 1})


def check(path: Path, ranks: int, parallel: dict[str, Any], train: dict[str, Any]) -> None:
    recorded, recorded_meta = read_trajectory(path)
    result, meta = run_trajectory(path, ranks, parallel, backend="gloo", **train)
    relative = ((result["grad_norm"] - recorded["grad_norm"]).abs() / recorded["grad_norm"]).max()
    assert float(relative) <= 1e-5, f"gradient norms differ by {float(relative):.1e}"
    gaps = differences(result, recorded)
    assert {name: gap for name, gap in gaps.items() if not gap <= ALLOWED[name]} == {}
    assert structure(meta) == structure(recorded_meta)
    assert torch.equal(result["loop_depth"].long(), recorded["loop_depth"].long())
