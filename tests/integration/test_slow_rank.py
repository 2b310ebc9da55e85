"""Saving, converting and loading where one rank takes longer than a collective may last: the others wait for it."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_sgt.checkpoint.layout import STATE_FILE, read_json
from megatron_sgt.checkpoint.reshard import sibling
from megatron_sgt.checkpoint.reshard.engine_state import load_into_engine
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader
from megatron_sgt.checkpoint.save import Saver
from megatron_sgt.checkpoint.shard_files import ShardFiles
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.deepspeed_files import odd_config
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch

TIMEOUT, LONGER = 2.0, 3.0
"""Seconds: of a collective, and of the work."""


def save_and_load(info: RankInfo, folder: Path) -> list[str]:
    """Which parts were slow, on this rank; everything is done in the end."""
    sections: dict[str, Any] = {"train": {"global_batch_size": 4}, "checkpoint": {"save": str(folder)}}
    config = odd_config(sections)
    groups = start_processes(config, info)
    engine = build_runtime(config, groups).engine
    train_step(engine, [random_batch(config)], 1e-3, 1.0, groups)
    for group in (None, groups.dp_group):
        dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=TIMEOUT), group)
    slowed: list[str] = []

    with pytest.MonkeyPatch.context() as monkeypatch:

        def slow(owner: Any, name: str, rank: int) -> None:
            call = getattr(owner, name)

            def late(*arguments: Any) -> Any:
                if name not in slowed:
                    slowed.append(name)
                    time.sleep(LONGER)
                return call(*arguments)

            if info.rank == rank:
                monkeypatch.setattr(owner, name, late)

        slow(ShardFiles, "_write", 1)
        slow(Saver, "_commit", 0)
        slow(sibling, "_is_whole", 0)
        slow(sibling, "write_part", 1)
        slow(sibling, "commit", 0)
        slow(LayoutFreeReader, "shard", 1)
        saver = Saver(config, engine, groups)
        saver.start(
            1,
            {"trainer": {"step": 1, "consumed_samples": 4, "skipped_steps": 0, "consecutive_skipped": 0}, "hooks": {}},
        )
        saved = saver.poll(wait=True)
        assert saved is not None
        copy, _ = sibling.layout_free_copy(saved.folder, groups)
        made = read_json(copy / STATE_FILE)["layout_free"]
        load_into_engine(LayoutFreeReader(copy), made["optimizer_step"], made["loss_scale"], config, engine, groups)
    train_step(engine, [random_batch(config)], 1e-3, 1.0, groups)
    return slowed


def test_no_slow_part_ends_the_run(tmp_path: Path) -> None:
    assert run_on_ranks(2, save_and_load, tmp_path, backend="gloo") == [
        ["_commit", "_is_whole", "commit"],
        ["_write", "write_part", "shard"],
    ]
