"""The authors' trajectory through the fused passes, whose operations run as their definitions on CPUs."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model import gpt, head_loop
from megatron_sgt.model.fused_pass import FusedLoop
from tests.helpers import replays
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trajectories import GOLDEN, read_trajectory


def fused_replay(info: RankInfo, path: Path, layout: dict[str, Any], train: dict[str, Any]) -> Any:
    """As ``replay_on``, fused; with the number of fused passes."""
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
    result = replays.replay_on(info, path, layout, train)
    assert passes > 50, "the fused passes did not run"
    return result


SHARDED = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "loop_method": "balanced"}


@pytest.mark.parametrize(
    ("layout", "train"),
    [
        ({"zero_stage": 3}, {}),
        ({"zero_stage": 3, **SHARDED}, {"recompute_granularity": "full"}),
        ({"zero_stage": 1, **SHARDED}, {}),
    ],
    ids=["zero 3", "zero 3, sequence parallel, recompute", "zero 1, sequence parallel"],
)
def test_golden(layout: dict[str, Any], train: dict[str, Any]) -> None:
    """ZeRO-3 here spreads every weight, however small: the kernels must find them inside the modules' calls."""
    result, meta = run_on_ranks(
        2, fused_replay, GOLDEN, layout, {"micro_batch_size": 4, **train}, timeout=300
    )[0]
    recorded, recorded_meta = read_trajectory(GOLDEN)
    assert replays.structure(meta) == replays.structure(recorded_meta)
    measured = replays.differences(result, recorded)
    beyond = {name: value for name, value in measured.items() if not value <= replays.ALLOWED[name]}
    assert not beyond, f"beyond fp32 noise: {beyond}; measured {measured}"
