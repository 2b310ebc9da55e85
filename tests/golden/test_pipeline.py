"""The golden trajectory through a pipeline: the same losses, gradient norms, entropies, weights and growth events.

`make test` takes a share of the layouts; `make test-all` takes all of them.
"""

from typing import Any

import pytest
import torch

from tests.helpers.exhaustive import share_of
from tests.helpers.trajectories import GOLDEN, read_trajectory
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
    recorded, recorded_meta = read_trajectory(GOLDEN)
    train = {"recompute_granularity": recompute, "micro_batch_size": 2 // data}
    result, meta = run_trajectory(GOLDEN, stages * tensor * data, parallel, backend="gloo", **train)
    relative = ((result["grad_norm"] - recorded["grad_norm"]).abs() / recorded["grad_norm"]).max()
    assert float(relative) <= 1e-5, f"gradient norms differ by {float(relative):.1e}"
    gaps = differences(result, recorded)
    assert {name: gap for name, gap in gaps.items() if not gap <= ALLOWED[name]} == {}
    assert structure(meta) == structure(recorded_meta)
    assert torch.equal(result["loop_depth"].long(), recorded["loop_depth"].long())
