"""ZeRO with optimizer state or weights moved off the device takes the steps that it takes without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trajectory_parts import run as rp

from megatron_sgt.engine.build import start_processes
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trajectories import make_trajectory, settings_of, write_trajectory

ALLOWED = {"loss": 1e-6, "grad_norm": 1e-5, "ema_entropy": 1e-6, "probe_logits": 1e-5}
"""Largest differences: sums in another order, amplified by ten steps of AdamW."""

CPU = {"device": "cpu"}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "optimizer at stage 1": (1, {"offload_optimizer": CPU}),
    "optimizer at stage 2": (2, {"offload_optimizer": CPU}),
    "optimizer at stage 3": (3, {"offload_optimizer": CPU}),
    "weights at stage 3": (3, {"offload_param": CPU}),
    "both at stage 3": (3, {"offload_optimizer": CPU, "offload_param": CPU}),
}
"""(ZeRO stage, what is added to zero_optimization)"""


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A selection, its window, and steps after it: the graph changes twice."""
    path = tmp_path_factory.mktemp("short") / "short.safetensors"
    write_trajectory(path, *make_trajectory({**settings_of("grouped_query_qk_norm"), "steps": 10}, seed=0))
    return path


def steps_of(
    info: RankInfo, path: Path, cases: list[tuple[int, dict[str, Any]]]
) -> list[tuple[tuple[str, str], rp.Tensors]]:
    """Where optimizer and weights were, and what a trajectory on these ranks sees, in each case; engines are new."""
    tensors, meta = rp.read_trajectory(path)
    found = []
    places: list[tuple[str, str]] = []
    build = rp.build_runtime

    def watched(*args: Any, **kwargs: Any) -> Any:
        runtime = build(*args, **kwargs)
        settings = runtime.engine.zero_offload_optimizer(), runtime.engine.zero_offload_param()
        places.append(tuple("device" if s is None else str(s.device) for s in settings))
        return runtime

    rp.build_runtime = watched  # type: ignore[assignment]
    for stage, zero in cases:
        spread = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        overrides = {
            "parallel": {"device": "cpu", "zero_stage": stage},
            "train": {"micro_batch_size": 1, "threads_per_rank": 1},
            "deepspeed": {"zero_optimization": {**spread, **zero}},
        }
        config = rp.trajectory_config(tensors, meta, overrides)
        result, _ = rp.repeat(config, start_processes(config, info), tensors, meta)
        found.append((places[-1], {name: result[name] for name in ALLOWED}))
    return found


def check(short: Path, cases: dict[str, tuple[int, dict[str, Any]]]) -> None:
    stages = sorted({stage for stage, _ in cases.values()})
    plain = [(stage, {}) for stage in stages]
    results = run_on_ranks(2, steps_of, short, [*plain, *cases.values()], timeout=400)[0]
    expected = dict(zip(stages, results, strict=False))
    for (name, (stage, zero)), (places, found) in zip(cases.items(), results[len(plain) :], strict=True):
        wanted = [zero.get(f"offload_{what}", {}).get("device", "device") for what in ("optimizer", "param")]
        assert list(places) == wanted, name
        for quantity, limit in ALLOWED.items():
            gap = float((found[quantity] - expected[stage][1][quantity]).abs().max())
            assert gap <= limit, f"{name} moves {quantity} by {gap:.1e}"


def test_the_same_steps_with_the_host_s_memory(short: Path) -> None:
    check(short, CASES)
