"""The project's own model, engine, optimizer and schedule reproduce recorded trajectories in every layout.

The golden file comes from the method's authors; the others come from the reference (helpers/reference_sgt.py),
with settings that the golden file does not have.
"""

from pathlib import Path

import pytest
import torch

from tests.helpers.exhaustive import exhaustive, share_of
from tests.helpers.trajectories import (
    GOLDEN,
    VARIANTS,
    decision_margin,
    make_trajectory,
    settings_of,
    write_trajectory,
)
from tests.helpers.trajectory_runs import check_trajectory, run_trajectory


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trajectories")
    paths = {}
    for variant in VARIANTS:
        paths[variant] = folder / f"{variant}.safetensors"
        write_trajectory(paths[variant], *make_trajectory(settings_of(variant), seed=0))
    return paths


SHARE = [(2, True, 1)]
EVERY = [(tensor, False, zero) for tensor in (1, 2) for zero in (0, 1, 2)] + [(2, True, 1)]


@pytest.mark.parametrize(("tensor", "sequence", "zero"), share_of(EVERY, SHARE))
def test_golden_over_gloo(tensor: int, sequence: bool, zero: int) -> None:
    """The other layouts, in test_layouts.py, talk through shared memory."""
    layout = {"tensor_model_parallel_size": tensor, "sequence_parallel": sequence, "zero_stage": zero}
    check_trajectory(GOLDEN, 2, layout, backend="gloo", micro_batch_size=4 * tensor // 2)


def test_golden_as_it_comes() -> None:
    """One process, one micro-batch, defaults."""
    check_trajectory(GOLDEN)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_in_one_process(variant: str, trajectories: dict[str, Path]) -> None:
    check_trajectory(trajectories[variant])


@pytest.mark.parametrize(
    ("variant", "tensor", "data", "layout"),
    [
        exhaustive(("grouped_query_qk_norm", 2, 1, {})),
        ("grouped_query_qk_norm", 2, 1, {"sequence_parallel": True}),
        ("olmo2", 2, 1, {}),
        ("olmo2", 2, 1, {"sequence_parallel": True, "zero_stage": 3, "loop_method": "owner"}),
        ("depth3_exponential", 2, 2, {"zero_stage": 1}),
        ("stopped_inside_a_window", 1, 2, {"zero_stage": 2}),
        exhaustive(("stopped_inside_a_window", 2, 1, {"zero_stage": 0})),
        ("wide_heads_tied", 2, 1, {"zero_stage": 0}),
        ("random_heads", 1, 4, {}),
        ("block_loop", 2, 1, {"sequence_parallel": True}),
    ],
)
def test_variant_on_ranks(
    variant: str, tensor: int, data: int, layout: dict[str, object], trajectories: dict[str, Path]
) -> None:
    layout = {"tensor_model_parallel_size": tensor, **layout}
    check_trajectory(trajectories[variant], tensor * data, layout, micro_batch_size=2 if data == 1 else 1)


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight heads; the first selected layer keeps two that four ranks place together."""
    settings = {**settings_of("eight_heads_keep_three"), "steps": 14}
    settings["growth"] |= {"num_keep_heads": 2, "max_loop_depth": 2}
    for seed in range(40):
        tensors, meta = make_trajectory(settings, seed, min_margin=0.0)
        (first, second), *_ = meta["events"][0]["kept_heads"].values()
        if first // 2 == second // 2 and decision_margin(tensors["ema_entropy"], meta) > 1e-4:
            path = tmp_path_factory.mktemp("neighbours") / "neighbours.safetensors"
            write_trajectory(path, tensors, meta)
            return path
    raise AssertionError("no seed keeps two heads of one rank")


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_all_kept_heads_on_one_rank(sequence_parallel: bool, neighbours: Path) -> None:
    """Ranks without a kept head still meet their peers in every collective."""
    layout = {"tensor_model_parallel_size": 4, "sequence_parallel": sequence_parallel}
    check_trajectory(neighbours, 4, layout, micro_batch_size=4)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection, a second loop, another selection, and the end inside its window."""
    path = tmp_path_factory.mktemp("short") / "short.safetensors"
    write_trajectory(path, *make_trajectory({**settings_of("depth2_cosine"), "steps": 14}, seed=0))
    return path


@pytest.mark.parametrize("tensor", [1, 2])
def test_recomputation_changes_nothing(tensor: int, short: Path) -> None:
    layout = {"tensor_model_parallel_size": tensor}
    plain, plain_meta = run_trajectory(short, tensor, layout)
    for recompute in ("selective", "full"):
        again, meta = run_trajectory(short, tensor, layout, recompute_granularity=recompute)
        assert meta["events"] == plain_meta["events"]
        for name in ("loss", "ema_entropy", "grad_norm", "probe_logits"):
            gap = float((again[name] - plain[name]).abs().max())
            assert gap <= 2e-6, f"{recompute} recomputation moves {name} by {gap:.1e}"


def test_a_trajectory_is_deterministic(short: Path) -> None:
    layout = {"tensor_model_parallel_size": 2, "zero_stage": 1}
    one, other = (run_trajectory(short, 4, layout)[0] for _ in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
