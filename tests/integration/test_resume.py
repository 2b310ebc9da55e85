"""A run that is stopped and resumed is the uninterrupted run, bit for bit: inside a window, on its end, and after
the structure is fixed. Every part of a chain of resumed runs is a set of new processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint.layout import read_json
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import (
    TINY,
    checkpoint_leaves,
    differing_leaves,
    measured_steps,
    pretrain,
    reported,
    tiny_config,
    write_tiny_data,
)

STOPS = (4, 9, 16)
"""Inside a window, on a window's end, after the structure is fixed."""
END = TINY["train"]["train_iters"]

DROPOUT = {"model": {"hidden_dropout": 0.1, "attention_dropout": 0.1}}


def zero(stage: int, precision: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Two data-parallel ranks with dropout and an average of the weights; at stage 3 they are really spread."""
    sections = {**DROPOUT, "parallel": {"zero_stage": stage}, "train": {"precision": precision, "ema_decay": 0.75}}
    if stage == 3:
        sections["deepspeed"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return 2, sections


LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "alone": (1, {}),
    "tensor_parallel": (2, {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}),
    # Dropout on attention makes kept heads loop at their owners.
    "dropout_tensor_parallel": (2, {**DROPOUT, "parallel": {"tensor_model_parallel_size": 2}}),
    **{f"zero_{stage}": zero(stage, "fp32") for stage in range(4)},
    **{f"zero_{stage}_bf16": zero(stage, "bf16") for stage in (1, 2, 3)},
}
"""(ranks, settings)"""
SHARE = ["alone", "tensor_parallel", "dropout_tensor_parallel", "zero_2", "zero_3", "zero_1_bf16"]
"""Every stage of ZeRO and both precisions; alone and with tensor parallelism an fp32 run has none."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def run(run_dir: Path, data: str, ranks: int, sections: dict[str, dict[str, Any]], **train: Any) -> Path:
    """Run (or resume) in new processes; returns the folder of checkpoints."""
    sections = {**sections, "train": {**sections.get("train", {}), **train}}
    run_on_ranks(ranks, pretrain, tiny_config(run_dir, data, **sections))
    return run_dir / "checkpoints"


@pytest.mark.parametrize("layout", share_of(LAYOUTS, SHARE))
def test_resumed_run_is_the_uninterrupted_run(layout: str, data: str, tmp_path: Path) -> None:
    ranks, sections = LAYOUTS[layout]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, data, ranks, sections)
    for stop in (*STOPS, None):
        run(parts, data, ranks, sections, exit_interval=stop)
    starts = [record["step"] for record in reported(parts, "resume")]
    assert starts == [0, *STOPS]
    expected = measured_steps(whole)
    assert [record["step"] for record in expected] == list(range(1, END + 1))
    for one, other in zip(expected, measured_steps(parts), strict=True):
        assert one == other
    assert reported(parts, "growth") == reported(whole, "growth")
    folder = f"checkpoints/global_step{END}"
    assert differing_leaves(whole / folder, parts / folder) == []
    states = [read_json(where / folder / "sgt_state.json") for where in (whole, parts)]
    assert states[0] == states[1]
    shared = {record["step"] for record in reported(whole, "valid")}
    assert [r for r in reported(parts, "valid") if r["step"] in shared] == reported(whole, "valid")


def test_the_stops_are_where_they_claim_to_be(data: str, tmp_path: Path) -> None:
    run(tmp_path / "run", data, 1, {})
    events = {record["step"]: record["action"] for record in reported(tmp_path / "run", "growth")}
    steps = {record["step"]: record for record in measured_steps(tmp_path / "run")}
    inside, on_end, after = STOPS
    assert inside not in events and any(0 < gate < 1 for gate in steps[inside]["other_gates"].values())
    assert events[on_end] in ("increase_depth", "select_new_layer")
    assert steps[after]["phase"] == "fixed" and after not in events
    assert {"first_selection", "increase_depth", "fixed"} <= set(events.values())


def test_the_comparison_covers_weights_optimizer_and_random_streams(data: str, tmp_path: Path) -> None:
    root = run(tmp_path / "run", data, 2, {}, exit_interval=3, ema_decay=0.75)
    leaves = checkpoint_leaves(root / "global_step3")
    for part in (
        "word_embeddings.weight",
        "exp_avg_sq",
        "single_partition_of_fp32_groups",
        "rng_rank_00001.pt",
        "ema_0001_mp_rank_00.pt/average/0",
    ):
        assert any(part in name for name in leaves), part


def test_saving_on_the_way_changes_nothing(data: str, tmp_path: Path) -> None:
    run(tmp_path / "without", data, 2, {}, exit_interval=8)
    saves = {"save_interval": 2, "keep_last": 2, "keep_every": 0}
    run(tmp_path / "with", data, 2, {"checkpoint": saves}, exit_interval=8)
    assert measured_steps(tmp_path / "with") == measured_steps(tmp_path / "without")
    folder = "checkpoints/global_step8"
    assert differing_leaves(tmp_path / "with" / folder, tmp_path / "without" / folder) == []
    kept = sorted(path.name for path in (tmp_path / "with/checkpoints").glob("global_step*"))
    assert kept == ["global_step6", "global_step8"]


def test_a_finished_run_is_left_alone(data: str, tmp_path: Path) -> None:
    root = run(tmp_path / "run", data, 1, {}, train_iters=5)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    run(tmp_path / "run", data, 1, {}, train_iters=5)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert [record["step"] for record in measured_steps(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_a_longer_run_continues_a_finished_one(data: str, tmp_path: Path) -> None:
    """The order of the data and a constant learning rate do not depend on the length of the run."""
    constant = {"optim": {"lr_decay_style": "constant"}}
    run(tmp_path / "whole", data, 1, constant, train_iters=8)
    run(tmp_path / "parts", data, 1, constant, train_iters=5)
    run(tmp_path / "parts", data, 1, constant, train_iters=8)
    assert measured_steps(tmp_path / "parts") == measured_steps(tmp_path / "whole")
