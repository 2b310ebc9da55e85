"""One trajectory, every parallel layout: the same losses, gradient norms, weights and growth events.

`make test` takes a share of the matrix in which every value of every factor meets every value of every other, and shows
part of it on a short trajectory; `make test-all` takes all of it on the authors'.
"""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from trajectory_parts import run as rp

from megatron_sgt.engine.build import start_processes
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.linear import LoopingRowParallelLinear
from megatron_sgt.model.norm import RMSNorm
from tests.helpers.exhaustive import exhaustive
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trajectories import GOLDEN, make_trajectory, read_trajectory, settings_of, write_trajectory
from tests.helpers.trajectory_runs import ALLOWED, differences, run_trajectory, structure, trajectory_on

SHAPES = [(1, 1, False), (1, 2, False)] + [(tp, dp, sp) for tp, dp in ((2, 1), (2, 2), (4, 1)) for sp in (False, True)]
"""(tensor parallel, data parallel, sequence parallel): all that fit four ranks."""

ALL = [(*shape, zero, recompute) for shape, zero, recompute in product(SHAPES, range(4), ("none", "full"))]

# The cheapest found that covers every pair of values of two factors that a shape allows.
SHARE = [(1, 1, False, 0, "full")]
SHORT = [
    (1, 2, False, 3, "full"),
    (2, 1, True, 1, "full"),
    (1, 2, False, 1, "none"),
    (2, 1, False, 2, "none"),
    (2, 1, True, 3, "none"),
    (1, 2, False, 2, "none"),
    (2, 2, True, 0, "none"),
    (4, 1, False, 0, "none"),
    (4, 1, False, 1, "none"),
    (4, 1, True, 2, "full"),
    (4, 1, True, 3, "none"),
]
"""Twelve steps of the reference show these: four ranks take a minute for the authors' sixty. Of two ranks these are in
test_trajectory.py."""


def marked(layout: tuple[int, int, bool, int, str]) -> Any:
    """Four tensor-parallel ranks are slow; what is not of the share is left to `make test-all`."""
    marks = [pytest.mark.slow] * (layout[0] == 4) + [pytest.mark.exhaustive] * (layout not in SHARE)
    return pytest.param(layout, marks=marks, id=str(layout))


def check(path: Path, tensor: int, data: int, sequence: bool, zero: int, recompute: str) -> None:
    layout = {"tensor_model_parallel_size": tensor, "sequence_parallel": sequence, "zero_stage": zero}
    recorded, recorded_meta = read_trajectory(path)
    # Two micro-batches: one hides errors of accumulation. With recompute, up to two ranks show these as well as four.
    micro_batches = 1 if recompute == "full" and tensor * data == 4 else 2
    size = recorded_meta["global_batch"] // data // micro_batches
    train = {"recompute_granularity": recompute, "micro_batch_size": size}
    result, meta = run_trajectory(path, tensor * data, layout, **train)
    gaps = differences(result, recorded)
    relative = ((result["grad_norm"] - recorded["grad_norm"]).abs() / recorded["grad_norm"]).max()
    assert float(relative) <= 1e-5, f"gradient norms differ by {float(relative):.1e}"
    assert {k: g for k, g in gaps.items() if not g <= ALLOWED[k]} == {}
    assert structure(meta) == structure(recorded_meta)
    assert torch.equal(result["loop_depth"].long(), recorded["loop_depth"].long())


@pytest.mark.parametrize("layout", map(marked, ALL))
def test_golden(layout: tuple[int, int, bool, int, str]) -> None:
    check(GOLDEN, *layout)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps with a selection and the end of its window."""
    path = tmp_path_factory.mktemp("short") / "short.safetensors"
    write_trajectory(path, *make_trajectory({**settings_of("grouped_query_qk_norm"), "steps": 12}, seed=0))
    return path


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As ``short``, with heads for four ranks."""
    path = tmp_path_factory.mktemp("eight") / "eight.safetensors"
    write_trajectory(path, *make_trajectory({**settings_of("eight_heads_keep_three"), "steps": 12}, seed=0))
    return path


@pytest.mark.parametrize("layout", SHORT, ids=str)
def test_a_short_trajectory(layout: tuple[int, int, bool, int, str], eight: Path) -> None:
    check(eight, *layout)


def sabotaged(info: RankInfo, path: Path, fault: str) -> Any:
    """A trajectory at tensor parallel 2 with sequence parallelism in which one thing is wrong."""
    if fault == "norm gradients are not summed":
        RMSNorm.replicated = lambda self, parameter: parameter  # type: ignore[method-assign]
    elif fault == "a weight is taken for replicated":
        forward = LoopingRowParallelLinear.__init__

        def cleared(self: Any, *args: Any, **kwargs: Any) -> None:
            forward(self, *args, **kwargs)
            self.weight.tensor_model_parallel = False

        LoopingRowParallelLinear.__init__ = cleared  # type: ignore[method-assign]
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "zero_stage": 1}
    return trajectory_on(info, path, layout, {"micro_batch_size": 2})


@pytest.mark.parametrize(
    ("fault", "quantity", "at_least"),
    [
        exhaustive(("none", "", 0.0)),
        ("norm gradients are not summed", "loss", 1e-4),
        ("a weight is taken for replicated", "grad_norm", 1e-2),
    ],
)
def test_what_would_go_wrong_is_seen(fault: str, quantity: str, at_least: float, short: Path) -> None:
    recorded, _ = read_trajectory(short)
    (result, _), _ = run_on_ranks(2, sabotaged, short, fault)
    gaps = differences(result, recorded)
    if fault == "none":
        assert {k: g for k, g in gaps.items() if not g <= ALLOWED[k]} == {}
    else:
        assert gaps[quantity] > at_least


def replicated_spread(info: RankInfo, path: Path) -> dict[str, float]:
    """Largest difference of each replicated weight between this rank and tensor-parallel rank 0, after all steps."""
    import torch.distributed as dist

    tensors, meta = rp.read_trajectory(path)
    overrides = {
        "parallel": {
            "device": "cpu",
            "tensor_model_parallel_size": info.world_size,
            "sequence_parallel": True,
        },
        "train": {"threads_per_rank": 1},
        "deepspeed": {},
    }
    config = rp.trajectory_config(tensors, meta, overrides)
    groups = start_processes(config, info)
    spread: dict[str, float] = {}
    gather = rp.gather_hf_weights

    def watch(runtime: Any, cfg: Any) -> Any:
        for name, parameter in runtime.model.named_parameters():
            if not getattr(parameter, "tensor_model_parallel", False):
                reference = parameter.detach().clone()
                dist.broadcast(reference, src=0)
                spread[name] = float((parameter - reference).abs().max())
        return gather(runtime, cfg)

    rp.gather_hf_weights = watch  # type: ignore[assignment]
    rp.repeat(config, groups, tensors, meta)
    return spread


def test_replicated_weights_stay_equal_to_the_last_bit(short: Path) -> None:
    for spread in run_on_ranks(2, replicated_spread, short):
        assert len(spread) == 21  # four norms in each of five layers, and the final one
        assert set(spread.values()) == {0.0}


@pytest.mark.exhaustive
def test_replicated_weights_stay_equal_over_the_whole_trajectory() -> None:
    for spread in run_on_ranks(2, replicated_spread, GOLDEN, timeout=400):
        assert len(spread) == 13  # two norms in each of six layers, and the final one
        assert set(spread.values()) == {0.0}


def test_the_share_covers_every_pair() -> None:
    def pairs(cases: list[Any]) -> set[Any]:
        return {(i, case[i], j, case[j]) for case in cases for i in range(5) for j in range(i)}

    missing = pairs(ALL) - pairs(SHARE + SHORT)
    assert not missing, sorted(map(str, missing))


def test_the_matrix_is_whole() -> None:
    assert len(ALL) == 64 and {*SHARE, *SHORT} <= set(ALL)
