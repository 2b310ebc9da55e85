"""Loss spikes: the rule, and a run that goes back and passes over the data, bit for bit."""

from __future__ import annotations

import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.config import Config
from megatron_sgt.engine.hooks.spike import LossSpike, SpikeHook, SpikeRule
from megatron_sgt.engine.loop import DivergedError
from megatron_sgt.engine.skipped_ranges import PASSED_FILE, SkippedRanges
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.metrics import MetricsHub
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import (
    differing_leaves,
    measured_steps,
    pretrain,
    reported,
    tiny_config,
    write_tiny_data,
)
from tests.helpers.single import small_config


def test_the_limit_is_mean_plus_sigma_deviations_of_a_full_window() -> None:
    rule = SpikeRule(2.0, 4)
    for loss in (9.0, 1.0, 2.0, 3.0):
        assert rule.limit() == math.inf
        rule.accept(loss)
    rule.accept(4.0)
    assert rule.limit() == pytest.approx(2.5 + 2 * math.sqrt(1.25))


def test_noise_is_no_spike_and_ten_sigma_is_one() -> None:
    rng = random.Random(3)
    rule, alarms = SpikeRule(6.0, 128), 0
    for step in range(5000):
        loss = 2.0 + 3.0 * math.exp(-step / 500) + rng.gauss(0, 0.05)
        alarms += loss > rule.limit()
        rule.accept(loss)
    assert alarms == 0
    assert rule.limit() < 2.0 + 10 * 0.05


class Noted(MetricsHub):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[tuple[str, dict[str, Any]]] = []

    def log(self, kind: str, record: Any) -> None:
        self.records.append((kind, dict(record)))


def hook(tmp_path: Path, hub: MetricsHub, can_go_back: bool = True, rollbacks: int = 0) -> SpikeHook:
    train = {"spike_sigma": 3.0, "spike_window_steps": 3, "max_rollbacks": 2}
    config = small_config(
        train={"train_iters": 9, "micro_batch_size": 2, "global_batch_size": 2, **train},
        checkpoint={"save_interval": 1},
    )
    skipped = SkippedRanges(tmp_path, [(1000 + n, 1001 + n) for n in range(rollbacks)])
    made = SpikeHook(config.train, skipped, lambda: can_go_back, hub, fake_groups(), lambda step: False)
    for step, loss in enumerate((1.0, 1.1, 0.9), start=1):
        made.after_step(TrainState(step=step, consumed_samples=2 * step), result(loss))
    return made


def result(loss: float, applied: bool = True) -> StepResult:
    return StepResult(torch.tensor(loss), 1.0, applied, 1e-3, 0.1)


def test_a_spike_asks_to_go_back(tmp_path: Path) -> None:
    with pytest.raises(LossSpike) as caught:
        hook(tmp_path, Noted()).after_step(TrainState(step=4, consumed_samples=8), result(1.5))
    assert (caught.value.step, caught.value.stop, caught.value.loss) == (4, 8, 1.5)


def test_another_sequence_length_is_judged_by_its_own_losses(tmp_path: Path) -> None:
    judged = hook(tmp_path, Noted())
    judged.begins_at = lambda step: step == 4
    judged.after_step(TrainState(step=4, consumed_samples=8), result(1.5))
    assert judged.state_dict() == {"losses": [1.5]}


def test_without_a_checkpoint_the_run_goes_on_and_the_spike_sets_no_standard(tmp_path: Path) -> None:
    hub = Noted()
    spiked = hook(tmp_path, hub, can_go_back=False)
    limit = spiked.rule.limit() if spiked.rule else 0
    spiked.after_step(TrainState(step=4, consumed_samples=8), result(1.5))
    assert spiked.rule is not None and spiked.rule.limit() == limit
    ((kind, record),) = hub.records
    assert (kind, record["spike_step"], record["path"]) == ("rollback", 4, None)


def test_a_skipped_step_is_not_judged(tmp_path: Path) -> None:
    state = hook(tmp_path, Noted())
    before = state.state_dict()
    state.after_step(TrainState(step=4, consumed_samples=8), result(math.nan, applied=False))
    assert state.state_dict() == before


def test_rollbacks_are_bounded(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match=r"1\.5000 of step 4 .* after 2 rollbacks; lower optim.lr"):
        hook(tmp_path, Noted(), rollbacks=2).after_step(TrainState(step=4, consumed_samples=8), result(1.5))


def test_the_window_survives_a_restart_and_may_be_missing(tmp_path: Path) -> None:
    one, other = hook(tmp_path, Noted()), hook(tmp_path, Noted())
    other.load_state_dict({})
    assert other.state_dict() == {} and other.rule is not None and other.rule.limit() == math.inf
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()


SPIKE_AT, SAVED_AT, END = 7, 4, 12
"""Step with the spiked batch, the checkpoint before it, and the last step."""


def spiked_config(run_dir: Path, data: str, **train: Any) -> Config:
    spike = {"spike_sigma": 8.0, "spike_window_steps": 4, "train_iters": END, "eval_interval": 0, "ema_decay": 0.75}
    return tiny_config(run_dir, data, train={**spike, **train}, checkpoint={"save_interval": SAVED_AT, "keep_last": 0})


def pretrain_spiked(info: RankInfo, config: Config, spiked: list[int]) -> None:
    """Train on data in which the global batches that begin at ``spiked`` have ten times the loss."""
    from megatron_sgt.data.loader import TrainLoader
    from megatron_sgt.model.gpt import LanguageModel

    fetch, forward = TrainLoader.__next__, LanguageModel.forward

    def marked(self: TrainLoader) -> Any:
        consumed = self.consumed_samples
        batch = fetch(self)
        return {**batch, "loss_mask": batch["loss_mask"] * (2.0 if consumed in spiked else 1.0)}

    def raised(self: LanguageModel, tokens: Any, labels: Any, loss_mask: Any, position_ids: Any) -> Any:
        factor = 10.0 if loss_mask.max() > 1.5 else 1.0
        return factor * forward(self, tokens, labels, loss_mask, position_ids)

    TrainLoader.__next__, LanguageModel.forward = marked, raised  # type: ignore[method-assign]
    pretrain(info, config)


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (2, {"tensor_model_parallel_size": 2, "zero_stage": 3})])
def test_a_run_goes_back_and_passes_over_the_data_for_good(
    ranks: int, parallel: dict[str, Any], tmp_path: Path
) -> None:
    data = write_tiny_data(tmp_path)
    batch, spiked = 8, [(SPIKE_AT - 1) * 8]

    def config(name: str, **train: Any) -> Config:
        made = spiked_config(tmp_path / name, data, **train)
        return made.model_copy(update={"parallel": made.parallel.model_copy(update=parallel)})

    run_on_ranks(ranks, pretrain_spiked, config("whole"), spiked)
    (event,) = reported(tmp_path / "whole", "rollback")
    passed = (SPIKE_AT - SAVED_AT) * batch
    assert (event["spike_step"], event["step"], event["passed_samples"]) == (SPIKE_AT, SAVED_AT, passed)
    steps = measured_steps(tmp_path / "whole")
    assert [s["step"] for s in steps] == list(range(1, END + 1)), "the undone steps do not count"
    assert steps[-1]["consumed_samples"] == END * batch + passed
    assert [s["consumed_samples"] for s in steps[3:5]] == [32, 32 + passed + batch]

    # A new process that starts from the checkpoint in front of the spike does not walk into it: the same run,
    # in every bit of its losses, weights, optimizer, growth and random streams.
    run_on_ranks(ranks, pretrain_spiked, config("parts", exit_interval=SAVED_AT), spiked)
    shutil.copy(tmp_path / f"whole/checkpoints/{PASSED_FILE}", tmp_path / "parts/checkpoints")
    run_on_ranks(ranks, pretrain_spiked, config("parts"), spiked)
    for one, other in zip(measured_steps(tmp_path / "parts"), steps, strict=True):
        assert one == other
    assert reported(tmp_path / "parts", "rollback") == []
    folder = f"checkpoints/global_step{END}"
    assert differing_leaves(tmp_path / "whole" / folder, tmp_path / "parts" / folder) == []


def test_without_the_file_the_new_process_meets_the_spike_again(tmp_path: Path) -> None:
    """So the file is what the test above owes its success to; and two spikes are two rollbacks."""
    data = write_tiny_data(tmp_path)
    spiked = [(SPIKE_AT - 1) * 8, 10 * 8]
    run_on_ranks(1, pretrain_spiked, spiked_config(tmp_path / "run", data), spiked)
    events = reported(tmp_path / "run", "rollback")
    assert [event["spike_step"] for event in events] == [SPIKE_AT, 8] and len(events) == 2
    assert len(SkippedRanges.read(tmp_path / "run/checkpoints").ranges) == 2
