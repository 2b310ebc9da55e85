"""What is reported, and when: nothing hidden in an average, FLOPs of what was executed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import Config, DataConfig
from megatron_sgt.engine.hooks.log import LogHook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.growth import LoopPlan, Schedule, build_schedule
from megatron_sgt.metrics import MetricsHub
from megatron_sgt.planning.flops import batch_flops, overhead, step_flops
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config

CONFIG = small_config(
    growth={"first_selection_step": 3, "window_size": 2, "max_selected_layers": 1, "max_loop_depth": 1},
    logging={"log_interval": 4},
)
LAYERS, HEADS = CONFIG.model.num_layers, CONFIG.model.num_attention_heads
BATCH = CONFIG.train.global_batch_size


class Collected:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.steps: list[int] = []

    def write(self, kind: str, record: Any) -> None:
        self.records.append({"kind": kind, **record})

    def advance(self, step: int) -> None:
        self.steps.append(step)

    def close(self) -> None:
        """Nothing is open."""


class Bench:
    """A hook with a schedule that grows, as the growth hook would drive it."""

    def __init__(self, config: Config = CONFIG, pairs: AttendedPairs | None = None) -> None:
        self.writer = Collected()
        self.schedule: Schedule = build_schedule(config.growth, LAYERS, HEADS)
        self.hook = LogHook(config, self.schedule, MetricsHub([self.writer]), fake_groups(), "fp32", pairs)
        self.state = TrainState()
        self.table = np.random.default_rng(0).uniform(0.2, 0.9, (LAYERS, 2, HEADS))
        self.hook.before_run(self.state)

    def step(self, loss: float, applied: bool = True, seconds: float = 0.5) -> None:
        if applied:
            self.state.step += 1
            self.schedule.observe("entropy", self.table)
            for event in self.schedule.after_step(self.state.step):
                self.hook.on_growth(event)
        else:
            self.state.skipped_steps += 1
        self.state.consumed_samples += BATCH
        norm = 1.0 if applied else math.inf
        self.hook.after_step(self.state, StepResult(torch.tensor(loss), norm, applied, 1e-3, seconds))

    def trained(self) -> list[dict[str, Any]]:
        return [record for record in self.writer.records if record["kind"] == "train"]


def test_flops_are_those_of_the_documents_and_padding_is_no_token() -> None:
    length, records = CONFIG.model.seq_length, []
    for pairs in (None, AttendedPairs(((length, float(length)),), padding=0.25)):
        bench = Bench(pairs=pairs)
        bench.step(2.0)
        records.append(bench.trained()[0])
    (whole, alone), layers = records, CONFIG.model.num_layers
    attention = 3 * 4 * BATCH * layers * CONFIG.model.num_attention_heads * CONFIG.model.kv_channels
    difference = whole["model_flops_per_step"] - alone["model_flops_per_step"]
    assert difference == attention * (length**2 - length), "documents of one token"
    assert alone["tokens_per_second"] == 0.75 * whole["tokens_per_second"]
    assert alone["tflops_per_device"] == pytest.approx(alone["model_flops_per_step"] / 0.5 / 1e12)


def test_the_first_step_and_every_interval_are_reported() -> None:
    bench = Bench()
    for _ in range(9):
        bench.step(2.0)
    assert [record["step"] for record in bench.trained()] == [1, 4, 8]
    assert bench.writer.steps == list(range(1, 10))


def test_the_end_of_the_run_is_reported() -> None:
    bench = Bench()
    for loss in (9.0, 8.0, 7.0, 6.0, 3.0, 1.0):
        bench.step(loss)
    bench.hook.after_run(bench.state)
    assert [(record["step"], record["loss"]) for record in bench.trained()] == [(1, 9.0), (4, 7.0), (6, 2.0)]
    assert bench.hook.last_loss == 2.0, "the summary shows the loss of the last steps"
    bench.hook.after_run(bench.state)
    assert len(bench.trained()) == 3, "steps that were reported are not reported again"


def test_a_run_without_a_step_reports_none() -> None:
    bench = Bench()
    bench.hook.after_run(bench.state)
    assert bench.trained() == []


def test_losses_are_averaged_since_the_last_report() -> None:
    bench = Bench()
    for loss in (9.0, 1.0, 2.0, 6.0):
        bench.step(loss)
    first, second = bench.trained()
    assert (first["loss"], second["loss"]) == (9.0, 3.0)
    assert (bench.hook.first_loss, bench.hook.last_loss) == (9.0, 3.0)
    assert second["consumed_samples"] == 4 * BATCH
    assert second["consumed_tokens"] == 4 * BATCH * CONFIG.model.seq_length
    assert second["tokens_per_second"] == pytest.approx(BATCH * CONFIG.model.seq_length / 0.5)
    assert second["step_time_s"] == 0.5


def test_a_skipped_step_is_reported_at_once() -> None:
    bench = Bench()
    bench.step(2.0)
    bench.step(2.0)
    bench.step(math.nan, applied=False)
    bench.step(2.0)
    shown = bench.trained()
    assert [(r["step"], r["skipped_steps"], r["nan_steps"]) for r in shown] == [(1, 0, 0), (2, 1, 1)]
    assert math.isnan(shown[1]["loss"]) and math.isinf(shown[1]["grad_norm"])
    assert shown[1]["total_skipped_steps"] == 1
    bench.step(2.0)
    assert bench.trained()[-1]["loss"] == 2.0, "the NaN is not carried into the next average"


def test_flops_are_those_of_the_plans_that_were_executed() -> None:
    bench = Bench()
    executed: list[LoopPlan] = []
    for _ in range(8):
        executed.append(bench.schedule.plan)
        bench.step(2.0)
    costs = [step_flops(CONFIG.model, plan, BATCH).model for plan in executed]
    assert len(set(costs)) == 3, "vanilla, window and sparse steps cost differently"
    _, second, third = bench.trained()
    assert second["model_flops_per_step"] == pytest.approx(sum(costs[1:4]) / 3)
    assert third["model_flops_per_step"] == pytest.approx(sum(costs[4:8]) / 4)


def test_a_curriculum_of_lengths_is_counted_and_told() -> None:
    """A skipped step has the length of the step that is tried."""
    entries = [{"until_steps": 2, "seq_length": 8}, {"until_steps": 5, "seq_length": 16}]
    data = DataConfig.model_validate({"seq_length_curriculum": entries})
    config = CONFIG.model_copy(update={"data": data})
    bench, executed = Bench(config), []
    for applied in (True, True, False, True, True, True, True):
        executed.append(bench.schedule.plan)
        bench.step(2.0, applied)
    bench.hook.after_run(bench.state)
    lengths = (8, 8, 16, 16, 16, 16, 32)
    costs = [batch_flops(config, plan, length, BATCH).model for plan, length in zip(executed, lengths, strict=True)]
    shown = bench.trained()
    assert [(record["step"], record["seq_length"]) for record in shown] == [(1, 8), (2, 16), (4, 16), (6, 32)]
    expected = [costs[0], sum(costs[1:3]) / 2, sum(costs[3:5]) / 2, sum(costs[5:7]) / 2]
    assert [record["model_flops_per_step"] for record in shown] == pytest.approx(expected)
    assert {record["tokens_per_second"] for record in shown} == {BATCH * 32 / 0.5}
    told = [record for record in bench.writer.records if record["kind"] == "length"]
    changes = [(r["step"], r["previous_seq_length"], r["seq_length"], r["sequences_per_step"]) for r in told]
    assert changes == [(2, 8, 16, 2 * BATCH), (5, 16, 32, BATCH)]
    assert told[1]["model_flops_per_step"] == costs[-1]


def test_no_length_is_told_without_a_curriculum() -> None:
    bench = Bench()
    for _ in range(4):
        bench.step(2.0)
    assert {record["kind"] for record in bench.writer.records} <= {"train", "growth"}
    assert all("seq_length" not in record for record in bench.trained())


def test_a_growth_event_tells_its_rank_and_cost() -> None:
    bench = Bench()
    for _ in range(3):
        bench.step(2.0)
    [grown] = [record for record in bench.writer.records if record["kind"] == "growth"]
    scores = bench.schedule.ema.mean(1)
    better = sum(1 for n in range(1, LAYERS) if scores[n] > scores[grown["layer"]])
    assert grown["layer_rank"] == 1 + better
    assert (grown["step"], grown["action"], grown["fade_until_step"]) == (3, "first_selection", 5)
    assert grown["num_candidates"] == LAYERS - 1
    assert grown["flops_overhead"] == pytest.approx(overhead(CONFIG.model, bench.schedule.plan.inference()))


def test_entropies_are_reported_only_while_they_are_measured() -> None:
    bench = Bench()
    for _ in range(8):
        bench.step(2.0)
    first, _, last = bench.trained()
    assert np.shape(first["ema_entropy"]) == (LAYERS, HEADS)
    assert "ema_entropy" not in last and last["phase"] == "fixed"
    assert last["loops"] == 1 and sum(last["loop_depth"]) == 1


def test_the_first_step_of_a_process_slows_no_others_figure() -> None:
    """A run that goes on at step 4 compiles in its step 5, far from the step 1 that is reported alone."""
    bench = Bench()
    bench.state.step = 4
    bench.step(2.0, seconds=60.0)
    for _ in range(7):
        bench.step(2.0)
    first, second = bench.trained()
    assert first["step"] == 8 and first["step_time_s"] == 0.5 and first["first_step_s"] == 60.0
    assert first["tokens_per_second"] == BATCH * CONFIG.model.seq_length / 0.5
    assert second["step_time_s"] == 0.5 and "first_step_s" not in second


def test_a_first_step_that_is_alone_tells_its_own() -> None:
    bench = Bench()
    bench.step(2.0, seconds=60.0)
    (only,) = bench.trained()
    assert only["step_time_s"] == only["first_step_s"] == 60.0
