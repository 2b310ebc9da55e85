"""Who holds up the others: the rule on noise and on a slow rank, and a real slow rank."""

from __future__ import annotations

import random
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.config import Config
from megatron_sgt.engine.hooks.straggler import (
    MIN_STEPS,
    PATIENCE,
    LagRule,
    StragglerHook,
    excess_in_stages,
    excess_over_median,
)
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.metrics import MetricsHub
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import pretrain, reported, tiny_config, write_tiny_data

RANKS = 64


def comparison(rng: random.Random, slow: dict[int, float]) -> list[float]:
    """Medians over ten steps of 64 ranks' work, each step with 5 % noise and a spike now and then."""

    def work(rank: int) -> float:
        steps = [
            (1 + slow.get(rank, 0.0)) * rng.lognormvariate(0, 0.05) * (3 if rng.random() < 0.02 else 1)
            for _ in range(10)
        ]
        return statistics.median(steps)

    return excess_over_median([work(rank) for rank in range(RANKS)])


def test_noise_names_nobody() -> None:
    rng, rule = random.Random(1), LagRule(0.15)
    assert [rule.judge(comparison(rng, {})) for _ in range(1000)] == [None] * 1000


def test_a_rank_slower_by_a_fifth_is_named_within_fifty_steps() -> None:
    """Comparisons every ten steps."""
    for seed in range(20):
        rng, rule = random.Random(seed), LagRule(0.15)
        named = [rule.judge(comparison(rng, {17: 0.2})) for _ in range(5)]
        assert [rank for rank in named if rank is not None] == [17], seed


def test_it_is_named_once_and_cleared_only_when_it_has_recovered() -> None:
    rule = LagRule(0.2)
    slow, half, fine = [0.0, 0.5], [0.0, 0.15], [0.0, 0.05]
    assert [rule.judge(slow) for _ in range(PATIENCE + 5)].count(1) == 1
    for _ in range(PATIENCE + 5):
        rule.judge(half)
    assert rule.named == 1, "between the two thresholds nothing changes"
    for _ in range(PATIENCE):
        rule.judge(fine)
    assert rule.named is None
    assert [rule.judge(slow) for _ in range(PATIENCE)][-1] == 1


def test_the_same_rank_must_lag_in_a_row() -> None:
    rule = LagRule(0.2)
    assert [rule.judge(e) for e in ([0.5, 0.0], [0.0, 0.5]) * 10] == [None] * 20


def test_excess() -> None:
    assert excess_over_median([1.0, 1.0, 1.5]) == [0.0, 0.0, 0.5]
    assert excess_over_median([0.0, 0.0, 0.1], base=0.5) == pytest.approx([0.0, 0.0, 0.2])
    assert excess_over_median([0.0, 0.0, 0.0]) == [0.0, 0.0, 0.0]


def test_a_rank_is_compared_within_its_pipeline_stage() -> None:
    """The second stage has the loops and takes twice as long; rank 5 is slow for a rank of that stage."""
    work = [1.0, 1.0, 1.0, 2.0, 2.0, 2.6]
    assert excess_in_stages(work, 2) == pytest.approx([0, 0, 0, 0, 0, 0.3])
    assert excess_in_stages([1.0, 2.0], 2) == [0.0, 0.0]
    assert excess_in_stages([0.0, 0.1, 0.4, 0.4], 2, base=0.5) == pytest.approx([0.0, 0.2, 0.0, 0.0])


@pytest.mark.parametrize(("tp_size", "dp_size", "active"), [(1, 1, False), (2, 1, True), (1, 2, True)])
def test_a_rank_that_is_alone_on_its_stage_is_not_measured(tp_size: int, dp_size: int, active: bool) -> None:
    groups = fake_groups(tp_size=tp_size, dp_size=dp_size, pp_size=2)
    layers = torch.nn.Module()
    assert StragglerHook(layers, 10, 0.15, MetricsHub([]), groups).active is active


def pretrain_slowed(info: RankInfo, config: Config, rank: int, where: str) -> None:
    """Train with one rank slow in its attention, or in fetching data."""
    from megatron_sgt.data.loader import TrainLoader
    from megatron_sgt.model.core_attention import SGTCoreAttention

    owner: Any = SGTCoreAttention if where == "computing" else TrainLoader
    name = "attend" if where == "computing" else "__next__"
    original = getattr(owner, name)

    def slowed(self: Any, *args: Any, **named: Any) -> Any:
        time.sleep(0.01 if where == "computing" else 0.04)
        return original(self, *args, **named)

    if info.rank == rank:
        setattr(owner, name, slowed)
    pretrain(info, config)


def pretrain_uneven_stages(info: RankInfo, config: Config) -> None:
    """PP2 x DP2: both ranks of the second stage take long, rank 3 longer."""
    from megatron_sgt.model.core_attention import SGTCoreAttention

    attend = SGTCoreAttention.attend

    def slowed(self: Any, *args: Any, **named: Any) -> Any:
        time.sleep((0.0, 0.0, 0.005, 0.015)[info.rank])
        return attend(self, *args, **named)

    SGTCoreAttention.attend = slowed  # type: ignore[method-assign]
    pretrain(info, config)


@pytest.mark.exhaustive
def test_a_slow_rank_of_a_slower_stage_is_named_and_no_rank_that_waits_for_it(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)
    steps = PATIENCE * MIN_STEPS
    config = tiny_config(
        tmp_path / "run",
        data,
        train={"train_iters": steps, "eval_interval": 0, "straggler_threshold": 0.5},
        parallel={"pipeline_model_parallel_size": 2},
    )
    run_on_ranks(4, pretrain_uneven_stages, config, backend="gloo")
    records = reported(tmp_path / "run", "ranks")
    assert [r["lagging_rank"] for r in records if "lagging_rank" in r] == [3]
    assert min(records[-1]["work_s"][2:]) > 2 * max(records[-1]["work_s"][:2]), "the stages differ by more than that"


@pytest.mark.parametrize("where", ["computing", "waiting for data"])
def test_a_slow_rank_is_named_although_all_steps_take_the_same_time(where: str, tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)
    steps = PATIENCE * MIN_STEPS
    config = tiny_config(
        tmp_path / "run", data, train={"train_iters": steps, "eval_interval": 0, "straggler_threshold": 0.25}
    )
    run_on_ranks(2, pretrain_slowed, config, 1, where)
    records = reported(tmp_path / "run", "ranks")
    assert [record["step"] for record in records] == [MIN_STEPS * n for n in range(1, PATIENCE + 1)]
    named = [(r["step"], r["lagging_rank"], r["what"]) for r in records if "lagging_rank" in r]
    assert named == [(steps, 1, where)]
    measured = records[-1]["work_s" if where == "computing" else "data_wait_s"]
    assert measured[1] > 3 * measured[0], "the fast rank's waiting does not hide the slow one"
