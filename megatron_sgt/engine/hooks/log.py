"""Reports: one record every log interval, one for every growth event."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import Config
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.growth import GrowthEvent, LoopPlan, Schedule
from megatron_sgt.guard.stop import named
from megatron_sgt.metrics import EtaEstimator, MetricsHub, peak_flops, throughput_record
from megatron_sgt.metrics.records import LengthRecord, TrainRecord
from megatron_sgt.parallel.collectives import mean_over_data_parallel
from megatron_sgt.parallel.device import device_name, memory_gb
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.planning.flops import batch_flops, overhead


class LogHook(Hook):
    """Averages losses over the interval (on the device, so that no step waits for it) and reports them.

    A skipped step is reported at once: a loss that is not finite is never hidden in an average.
    """

    name = "log"

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        hub: MetricsHub,
        groups: ParallelGroups,
        precision: str,
        pairs: AttendedPairs | None = None,
    ) -> None:
        """``pairs``: of the data, which FLOPs count, and whose padding tokens per second do not."""
        self.config = config
        self.schedule = schedule
        self.hub = hub
        self.groups = groups
        self.pairs = pairs
        self.peak = peak_flops(device_name(groups.device), precision)
        self.eta = EtaEstimator()
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.tokens_per_second: float | None = None
        self.lengths, self.batches = config.seq_lengths, config.batches
        self.tokens_of: Callable[[int], int] = lambda samples: samples * config.model.seq_length
        """Tokens of the first so many samples of the run."""
        self._executed: LoopPlan = schedule.plan
        self._flops_of: dict[tuple[LoopPlan, int, int, AttendedPairs | None], int] = {}
        self._losses: list[torch.Tensor] = []
        self._last: StepResult | None = None
        self._skipped = 0
        self._timed: list[tuple[float, int]] = []  # (seconds, FLOPs) by step
        self._first_is_reported = False

    def before_run(self, state: TrainState) -> None:
        """The first step executes the schedule's present plan; what was added up before a rollback is void."""
        self._executed = self.schedule.plan
        self._losses, self._skipped, self._timed = [], 0, []

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self._last = result
        self._losses.append(result.loss)
        self._skipped += not result.applied
        step = state.step if result.applied else state.step + 1
        self._timed.append((result.seconds, self._model_flops(self._executed, step)))
        self._executed = self.schedule.plan  # growth has acted: this is what the next step executes
        self.hub.advance(state.step)
        interval = self.config.logging.log_interval
        if state.step % interval == 0 or state.step == 1 or not result.applied or self._goes_on_otherwise(state.step):
            self._report(state, result)
        goes_on = result.applied and state.step < self.config.train.train_iters and not self.config.phases
        if goes_on and self.lengths.changes_at(state.step + 1):  # a phase is reported by itself (engine/phases.py)
            self._report_length(state.step)

    def _goes_on_otherwise(self, step: int) -> bool:
        """Whether the next step has another batch size or phase: no record sums up steps of two."""
        return self.batches.at(step) != self.batches.at(step + 1) or self.config.phase_begins_at(step + 1)

    def after_run(self, state: TrainState) -> None:
        if self._last is not None and self._losses:
            self._report(state, self._last)

    def after_stage(self, state: TrainState) -> None:
        """No record sums up steps of two models."""
        self.after_run(state)

    def on_stop(self, state: TrainState, reason: int) -> None:
        self.after_run(state)
        self.hub.log("stop", {"step": state.step, "reason": named(reason)})

    def _model_flops(self, plan: LoopPlan, step: int) -> int:
        """Of ``plan``, in step ``step``."""
        key = plan, self.lengths.at(step), self.batches.at(step), self._pairs_at(step)
        if key not in self._flops_of:
            if len(self._flops_of) > 64:  # gates make a new plan every step of a window
                self._flops_of.clear()
            self._flops_of[key] = batch_flops(self.config, *key).model
        return self._flops_of[key]

    def _pairs_at(self, step: int) -> AttendedPairs | None:
        return None if self.pairs is None else self.pairs.at(step)

    def _report_length(self, step: int) -> None:
        seq_length = self.lengths.at(step + 1)
        record: LengthRecord = {
            "step": step,
            "seq_length": seq_length,
            "previous_seq_length": self.lengths.at(step),
            "sequences_per_step": self.config.tokens_per_step // seq_length,
            "model_flops_per_step": self._model_flops(self.schedule.plan, step + 1),
        }
        self.hub.log("length", record)

    def _report(self, state: TrainState, result: StepResult) -> None:
        loss = float(mean_over_data_parallel(torch.stack(self._losses).mean(), self.groups))
        # What is compiled and allocated in the first step is no other step's: it has a field of its own.
        timed = (self._timed if self._first_is_reported else self._timed[1:]) or self._timed
        steps, train = len(timed), self.config.train
        seconds, flops = sum(s for s, _ in timed), sum(f for _, f in timed)
        step = state.step if result.applied else state.step + 1
        samples = self.batches.at(step)
        pairs = self._pairs_at(step)
        tokens = steps * samples * self.config.model.seq_length * (1 - pairs.padding if pairs else 1)
        self.eta.update(seconds / samples, steps)  # by sample: later steps may have more of them
        used, total = memory_gb(self.groups.device)
        speed = throughput_record(tokens, flops, seconds, self.groups.world_size, self.peak)
        self.first_loss = loss if self.first_loss is None else self.first_loss
        self.last_loss = loss
        self.tokens_per_second = speed["tokens_per_second"]
        plan = self.schedule.plan
        record: TrainRecord = {
            "step": state.step,
            "train_iters": train.train_iters,
            "consumed_samples": state.consumed_samples,
            "consumed_tokens": self.tokens_of(state.consumed_samples),
            "global_batch_size": samples,
            "loss": loss,
            "grad_norm": result.grad_norm,
            "lr": result.lr,
            "step_time_s": seconds / steps,
            "model_flops_per_step": flops / steps,
            **speed,
            "device": "cpu" if self.groups.device.type == "cpu" else "gpu",
            "memory_gb": used,
            "memory_total_gb": total,
            "eta_s": self.eta.remaining_s(self._samples_left(state.step)),
            "skipped_steps": self._skipped,
            "nan_steps": int(not math.isfinite(loss)),
            "total_skipped_steps": state.skipped_steps,
            "loops": sum(plan.loops),
            "phase": self.schedule.phase,
            "loop_depth": list(plan.loops),
            "other_gates": {str(layer): one.other_gate for layer, one in plan.layers},
        }
        if not self._first_is_reported:
            record["first_step_s"] = self._timed[0][0]
        if self.lengths.ends:
            record["seq_length"] = self.lengths.at(step)
        if result.loss_scale is not None:
            record["loss_scale"] = result.loss_scale
        self.hub.log("train", {**self.schedule.report(), **record})
        self._losses, self._skipped, self._timed, self._first_is_reported = [], 0, [], True

    def _samples_left(self, step: int) -> int:
        return self.batches.samples(self.config.train.train_iters) - self.batches.samples(step)

    def on_growth(self, event: GrowthEvent) -> None:
        cost = overhead(self.config.model, self.schedule.plan.inference(), self._pairs_at(event.step))
        record = {**self.schedule.report_event(event), **event.to_dict(), "flops_overhead": cost}
        self.hub.log("growth", record)
