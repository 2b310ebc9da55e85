"""Runs that are killed in the middle of a save lose no checkpoint, and end as if nothing had happened.

All ranks are killed at a random moment of a save while one rank's storage is slow, started again, killed again.
In the end every step of the run must be, bit for bit, that of a run that was never killed.
SAVE_KILLS=50 sets the number of kills, over all layouts; without it a few kills of two of them, and of all of them in
the exhaustive form.
"""

from __future__ import annotations

import io
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint import layout, manifest, shard_files
from megatron_sgt.config import Config
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.exhaustive import exhaustive, share_of
from tests.helpers.ranks import run_on_ranks, running_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config, write_tiny_data

KILLS = int(os.environ.get("SAVE_KILLS", "0"))
SHORT = 3
"""Kills per layout of the short form."""
SLOW_S = 0.15
"""Seconds that the slow rank's storage takes for the second half of a file."""
TIMEOUT_S = 120.0

LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "tp2_zero1_async": {
        "parallel": {"tensor_model_parallel_size": 2, "zero_stage": 1},
        "deepspeed": {"zero_optimization": {"stage": 1}},  # else one data-parallel rank goes without
        "checkpoint": {"async_save": True},
    },
    "dp2_zero3": {"parallel": {"zero_stage": 3}},
    "dp2_zero1": {"parallel": {"zero_stage": 1}},
    "tp2_zero3_async": {
        "parallel": {"tensor_model_parallel_size": 2, "zero_stage": 3},
        "deepspeed": {"zero_optimization": {"stage": 3}},
        "checkpoint": {"async_save": True},
    },
    "pp2_dp2_zero1_async": {
        "parallel": {"pipeline_model_parallel_size": 2, "zero_stage": 1},
        "checkpoint": {"async_save": True},
    },
    "pp2_dp2_zero2": {"parallel": {"pipeline_model_parallel_size": 2, "zero_stage": 2}},
}
RANKS = {name: 4 if name.startswith("pp2") else 2 for name in LAYOUTS}
SHARE = list(LAYOUTS)[:2]


def on_slow_storage(info: RankInfo, config: Config) -> None:
    """Train; the last rank's files take long, and are half written for a while."""
    original = torch.save

    def slow(content: Any, path: Any, **options: Any) -> None:
        if not isinstance(path, Path):  # tensors that ranks send to one another
            original(content, path, **options)
            return
        stream = io.BytesIO()
        original(content, stream)
        data = stream.getvalue()
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            time.sleep(SLOW_S)
            file.write(data[len(data) // 2 :])

    if info.rank == info.world_size - 1:
        shard_files.torch.save = slow  # type: ignore[assignment]
    pretrain(info, config)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def run_config(run_dir: Path, data: str, name: str, stop: int | None = None) -> Config:
    sections = LAYOUTS[name]
    checkpoint = {"save_interval": 1, "keep_last": 2, **sections.get("checkpoint", {})}
    train = {"train_iters": 1_000_000, "eval_interval": 0, "exit_interval": stop}
    return tiny_config(run_dir, data, **{**sections, "checkpoint": checkpoint, "train": train})


def saving(root: Path) -> int:
    """The step of the save that is going on, 0 if there is none."""
    return max((layout.step_of(path.name.partition(".")[0]) for path in root.glob("global_step*.tmp")), default=0)


def step_reached(root: Path) -> int:
    """The step that a run would resume from, from a checkpoint of which every byte is right."""
    tag = layout.latest_tag(root)
    if tag is None:
        return 0
    manifest.verify_checksums(root / tag)
    return layout.step_of(tag)


def kill_in_a_save(config: Config, ranks: int, rng: random.Random) -> bool:
    """Start, let two saves pass, kill all ranks at a random moment of a later one; was it in the middle?"""
    root = config.save_dir
    begun = step_reached(root)
    with running_on_ranks(ranks, on_slow_storage, config) as pids:
        deadline = time.monotonic() + TIMEOUT_S
        while saving(root) < begun + 2:
            assert time.monotonic() < deadline, "no save was seen"
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 3 * SLOW_S))
        tag = layout.latest_tag(root)
        finished = 0 if tag is None else layout.step_of(tag)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert finished >= begun + 1
    assert step_reached(root) >= finished, "a checkpoint was lost"
    return saving(root) > step_reached(root)


def on_full_disk(info: RankInfo, config: Config) -> None:
    """Train; the last rank cannot write its first file."""
    original, calls = torch.save, []

    def full(content: Any, path: Any, **options: Any) -> None:
        calls.extend([path] if isinstance(path, Path) else [])
        if calls == [path]:
            raise OSError(28, "No space left on device")
        original(content, path, **options)

    if info.rank == info.world_size - 1:
        shard_files.torch.save = full  # type: ignore[assignment]
    pretrain(info, config)


@pytest.mark.parametrize("name", ["dp2_zero1", "tp2_zero1_async", exhaustive("pp2_dp2_zero2")])
def test_a_disk_that_is_full_for_one_rank_stops_nobody(name: str, data: str, tmp_path: Path) -> None:
    config = run_config(tmp_path, data, name, stop=6)
    run_on_ranks(RANKS[name], on_full_disk, config, backend="gloo")
    [failed] = reported(tmp_path, "save_failed")
    assert "global_step1: No space left on device" in failed["reason"] and "training goes on" in failed["reason"]
    assert layout.step_of(layout.finished_tags(config.save_dir)[-1]) == 6 == step_reached(config.save_dir)
    assert next(record["step"] for record in reported(tmp_path, "save")) > 1
    assert not list(config.save_dir.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS if KILLS else share_of(LAYOUTS, SHARE))
def test_killed_in_saves_the_run_is_the_uninterrupted_run(name: str, data: str, tmp_path: Path) -> None:
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    rng = random.Random(f"{name} {KILLS}")
    kills = -(-KILLS // len(LAYOUTS)) or SHORT
    config = run_config(run_dir, data, name)
    inside = sum(kill_in_a_save(config, RANKS[name], rng) for _ in range(kills))
    last = step_reached(config.save_dir) + 2
    for folder in (run_dir, whole):
        run_on_ranks(RANKS[name], pretrain, run_config(folder, data, name, last), backend="gloo")
    assert measured_steps(run_dir) == measured_steps(whole)
    assert not list(config.save_dir.glob("*.tmp"))
    assert inside > 0, "no kill was in the middle of a save"
    print(f"{name}: {kills} kills, {inside} of them in the middle of a save, {last} steps bit for bit")
