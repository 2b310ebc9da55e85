"""Growth is decided once for all ranks: entropies that differ in their last bit change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgt.config import Config
from megatron_sgt.engine.hooks import growth as growth_hook
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.hooks.replicas import PlanMismatchError
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.growth import LoopPlan, Schedule
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan, executed_plan
from megatron_sgt.model.entropy_meter import EntropyMeter
from megatron_sgt.parallel.groups import ParallelGroups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import tiny_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


class Fingerprints(Hook):
    """Notes after every step what the schedule asks for and what the layers execute."""

    name = "fingerprints"

    def __init__(self, schedule: Schedule, model: Any) -> None:
        self.schedule = schedule
        self.model = model
        self.seen: list[tuple[str, str]] = []

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self.seen.append((self.schedule.plan.fingerprint(), executed_plan(self.model).fingerprint()))


def train_apart(info: RankInfo, config: Config, ties: bool, share: bool) -> tuple[list[tuple[str, str]], list[Any]]:
    """Train while the last rank's entropies are 1 ulp larger in one layer.

    ties: all entropies are 0.5, so that this last bit decides. share: as it is; else every rank keeps its own
    table, to show that the test would notice.
    """
    measured = EntropyMeter.reduce

    def reduce(meter: EntropyMeter, groups: ParallelGroups) -> np.ndarray:
        table = measured(meter, groups)
        if ties:
            table = np.full_like(table, 0.5)
        if groups.rank == groups.world_size - 1:
            table[3] = np.nextafter(table[3], 1.0)
        return table

    EntropyMeter.reduce = reduce  # type: ignore[method-assign]
    if not share:
        growth_hook.broadcast_object = lambda value, groups: value
    run = PretrainingRun(config, info)
    fingerprints = Fingerprints(run.schedule, run.runtime.model)
    run.hooks.append(fingerprints)
    run.train()
    return fingerprints.seen, run.growth.events


class Disobedient(Hook):
    """On the last rank, the layers execute another plan than the schedule's after step 5, which decides nothing."""

    name = "disobedient"

    def __init__(self, run: PretrainingRun, last: bool) -> None:
        self.run = run
        self.last = last

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if self.last and state.step == 5:
            apply_plan(self.run.runtime.model, LoopPlan.empty(self.run.config.model.num_layers))


def save_apart(info: RankInfo, config: Config) -> None:
    run = PretrainingRun(config, info)
    disobedient = Disobedient(run, info.rank == info.world_size - 1)
    run.hooks.insert(run.hooks.index(run.growth) + 1, disobedient)
    run.train()


LAYOUTS = {
    "data_parallel": (2, {}),
    "tensor_parallel": (2, {"tensor_model_parallel_size": 2}),
    "both": (4, {"tensor_model_parallel_size": 2}),
}


def settings(layout: str, ties: bool, run_dir: Path, data: str) -> tuple[int, Config]:
    ranks, parallel = LAYOUTS[layout]
    # A choice of one layer and two heads out of equals.
    growth = {"top_k_layers": 1, "max_selected_layers": 1} if ties else {}
    train = {"exit_interval": 8, "eval_interval": 0}
    return ranks, tiny_config(run_dir, data, parallel=parallel, growth=growth, train=train)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_ulp_on_one_rank_changes_nothing(layout: str, ties: bool, data: str, tmp_path: Path) -> None:
    ranks, config = settings(layout, ties, tmp_path, data)
    results = run_on_ranks(ranks, train_apart, config, ties, True)
    steps, events = results[0]
    assert all(asked == executed for asked, executed in steps)
    assert len(set(steps)) > 3 and len(events) >= 2, "growth happened"
    for other, other_events in results[1:]:
        assert other == steps
        assert [e["kept_heads"] for e in other_events] == [e["kept_heads"] for e in events]
    if ties:
        assert (events[0]["layer"], events[0]["kept_heads"]) == (1, {"1": [0, 1]}), "rank 0's table decides"


def test_without_sharing_the_last_bit_would_decide(data: str, tmp_path: Path) -> None:
    ranks, config = settings("data_parallel", True, tmp_path, data)
    with pytest.raises(PlanMismatchError, match="rank 1 executes another structure than rank 0"):
        run_on_ranks(ranks, train_apart, config, True, False)


def test_nothing_is_saved_of_ranks_that_differ(data: str, tmp_path: Path) -> None:
    train = {"exit_interval": 8, "eval_interval": 0}
    config = tiny_config(tmp_path, data, train=train, checkpoint={"save_interval": 1})
    with pytest.raises(PlanMismatchError, match="rank 1 executes another structure than rank 0"):
        run_on_ranks(2, save_apart, config)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("global_step*"))
    assert saved[-1] == "global_step4"
