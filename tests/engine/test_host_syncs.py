"""How often a step through DeepSpeed makes the host wait for its device, taking a GPU's branches on a CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.host_syncs import counted, pretend_streams
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, small_config

MICRO_BATCHES = 4
READ = "aten._local_scalar_dense.default"


def waits_of_a_step(info: RankInfo, stage: int, precision: str) -> dict[str, list[list[str]]]:
    """By method of the engine, what every call of it waited for in the fourth step; "step" whole under ""."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = small_config(
            parallel={"zero_stage": stage},
            train={"global_batch_size": 2 * MICRO_BATCHES * info.world_size, "precision": precision},
        )
        groups = start_processes(config, info)
        waits = pretend_streams(monkeypatch)
        engine = build_runtime(config, groups).engine
        engine.train()
        batches = [random_batch(config, seed=10 * groups.dp_rank + m) for m in range(MICRO_BATCHES)]
        for _ in range(3):  # DeepSpeed's throughput timer sleeps for two steps
            train_step(engine, batches, 1e-2, 1.0, groups)
        seen: dict[str, list[list[str]]] = {"forward": [], "backward": [], "step": []}

        def watched(name: str, call: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                before = len(waits)
                result = call(*args, **kwargs)
                seen[name].append(waits[before:])
                return result

            return run

        for name in seen:
            monkeypatch.setattr(engine, name, watched(name, getattr(engine, name)))
        with counted(waits):
            train_step(engine, batches, 1e-2, 1.0, groups)
            seen[""] = [list(waits)]
        return seen


@pytest.fixture(
    scope="module", params=[(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")], ids=lambda p: f"zero {p[0]}"
)
def stage_and_waits(request: pytest.FixtureRequest) -> tuple[int, dict[str, list[list[str]]]]:
    stage, precision = request.param
    return stage, run_on_ranks(2, waits_of_a_step, stage, precision)[0]


def test_forward_and_backward_wait_for_nothing(
    stage_and_waits: tuple[int, dict[str, list[list[str]]]],
) -> None:
    """But at ZeRO-3, where DeepSpeed waits for its stream of reductions at the end of every backward pass."""
    stage, seen = stage_and_waits
    assert len(seen["forward"]) == len(seen["backward"]) == len(seen["step"]) == MICRO_BATCHES
    assert seen["forward"] == [[]] * MICRO_BATCHES
    allowed = {"side stream.synchronize", "event.synchronize"} if stage == 3 else set()
    for waits in seen["backward"]:
        assert set(waits) <= allowed and max(Counter(waits).values(), default=0) <= 1, waits
    assert seen["step"][:-1] == [[]] * (MICRO_BATCHES - 1), "nothing is to be done before the last micro-batch"


def test_a_step_waits_once_to_read_its_norm(stage_and_waits: tuple[int, dict[str, list[list[str]]]]) -> None:
    """What is read is there when the norm is: the same number again, or AdamW's counters, which lie on the host."""
    stage, seen = stage_and_waits
    assert {*seen["step"][-1]} <= {READ, "tolist", *(["device.synchronize"] if stage == 3 else [])}
    assert Counter(seen["step"][-1])["device.synchronize"] == (stage == 3)
    inside = [wait for name in ("forward", "backward", "step") for waits in seen[name] for wait in waits]
    outside = Counter(seen[""][0]) - Counter(inside)
    assert outside == ({"tolist": 1} if stage == 0 else {READ: 1}), "read by engine/step.py"


def timed_by_deepspeed(info: RankInfo) -> list[str]:
    """What a step waits for with the timer that DeepSpeed starts by default."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = small_config(
            train={"global_batch_size": 2 * MICRO_BATCHES},
            deepspeed={"timers": {"throughput": {"enabled": True}}},
        )
        groups = start_processes(config, info)
        waits = pretend_streams(monkeypatch)
        engine = build_runtime(config, groups).engine
        engine.train()
        batches = [random_batch(config, seed=m) for m in range(MICRO_BATCHES)]
        for _ in range(4):
            waits.clear()
            train_step(engine, batches, 1e-2, 1.0, groups)
        return list(waits)


def test_deepspeeds_own_timer_would_be_seen() -> None:
    assert Counter(run_on_ranks(1, timed_by_deepspeed)[0])["device.synchronize"] == 2 * MICRO_BATCHES
