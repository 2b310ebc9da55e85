"""An engine that was let go of is freed; without the call it stays. tests/engine/test_stage.py has whole runs."""

from __future__ import annotations

import gc
import weakref

from megatron_sgt.compat.release import release_engine
from megatron_sgt.config import Config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

STAGE_3 = small_config(
    parallel={"zero_stage": 3}, train={"global_batch_size": 4}, deepspeed={"zero_optimization": {"stage": 3}}
)


def lives(info: RankInfo, config: Config) -> list[bool]:
    """Whether an engine that has trained lives on when it is dropped: without a release, and after one."""
    groups, found = start_processes(config, info), []
    for released in (False, True):
        engine = build_runtime(config, groups).engine
        for step in range(3):  # ZeRO-3 caches from the second step on
            train_step(engine, [random_batch(config, step)], 1e-3, 1.0, groups)
        alive = weakref.ref(engine), weakref.ref(engine.module)
        if released:
            release_engine(engine)
        del engine
        gc.collect()
        found.append(any(one() is not None for one in alive))
    return found


def test_an_engine_is_freed_once_it_is_released() -> None:
    assert run_on_ranks(2, lives, STAGE_3) == [[True, False]] * 2
