"""The authors' trajectory through the fused passes, whose operations run as their definitions on CPUs."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model import gpt, head_loop
from megatron_sgt.model.fused_pass import FusedLoop
from tests.helpers import trajectory_runs
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trajectories import GOLDEN, make_trajectory, read_trajectory, settings_of, write_trajectory


def fused_trajectory(info: RankInfo, path: Path, layout: dict[str, Any], train: dict[str, Any]) -> Any:
    """As ``trajectory_on``, fused; with the number of fused passes."""
    gpt.loop_backend = lambda *_: ("triton", "")  # type: ignore[assignment]
    head_loop.choose_attention = lambda *_: "custom"  # type: ignore[assignment]
    passes = 0

    def counted(original: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal passes
            passes += 1
            return original(*args)

        return call

    FusedLoop.__call__ = counted(FusedLoop.__call__)  # type: ignore[method-assign]
    result = trajectory_runs.trajectory_on(info, path, layout, train)
    assert passes > 50, "the fused passes did not run"
    return result


SHARDED = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "loop_method": "balanced"}


ZERO_1, ZERO_3 = ({"zero_stage": stage, **SHARDED} for stage in (1, 3))
FULL = {"recompute_granularity": "full"}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two selections, a second loop, and the end inside a window."""
    path = tmp_path_factory.mktemp("short") / "short.safetensors"
    write_trajectory(path, *make_trajectory({**settings_of("depth2_cosine"), "steps": 14}, seed=0))
    return path


@pytest.mark.parametrize(
    ("layout", "train"),
    [
        pytest.param({"zero_stage": 3}, {}, id="zero 3"),
        pytest.param(ZERO_1, {}, id="zero 1, sequence parallel"),
        pytest.param(ZERO_3, FULL, id="zero 3, sequence parallel, recompute", marks=pytest.mark.exhaustive),
    ],
)
def test_golden(layout: dict[str, Any], train: dict[str, Any]) -> None:
    """ZeRO-3 here spreads every weight, however small: the kernels must find them inside the modules' calls."""
    check(GOLDEN, layout, {"micro_batch_size": 4, **train})


def test_everything_at_once_over_a_few_steps(short: Path) -> None:
    """ZeRO-3 over one data-parallel rank, sequence parallelism and recomputation."""
    check(short, ZERO_3, {"micro_batch_size": 2, **FULL})


def check(path: Path, layout: dict[str, Any], train: dict[str, Any]) -> None:
    result, meta = run_on_ranks(2, fused_trajectory, path, layout, train, timeout=300)[0]
    recorded, recorded_meta = read_trajectory(path)
    assert trajectory_runs.structure(meta) == trajectory_runs.structure(recorded_meta)
    measured = trajectory_runs.differences(result, recorded)
    beyond = {name: value for name, value in measured.items() if not value <= trajectory_runs.ALLOWED[name]}
    assert not beyond, f"beyond fp32 noise: {beyond}; measured {measured}"
