"""A whole pretraining run: from a validated configuration to a summary."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.load import verify_together
from megatron_sgt.config import Config
from megatron_sgt.data.gpt_dataset import build_datasets
from megatron_sgt.data.loader import EvalLoader, TrainLoader
from megatron_sgt.data.tokenizer import tokenizer_of
from megatron_sgt.engine.build import Runtime, build_runtime, start_processes
from megatron_sgt.engine.data_start import DataStart, data_record, data_start, record_at
from megatron_sgt.engine.deepspeed_config import check_deepspeed
from megatron_sgt.engine.hooks.base import Hook, RunParts, own_hooks
from megatron_sgt.engine.hooks.checkpoint import CheckpointHook
from megatron_sgt.engine.hooks.ema import EmaHook
from megatron_sgt.engine.hooks.growth import GrowthHook
from megatron_sgt.engine.hooks.log import LogHook
from megatron_sgt.engine.hooks.replicas import ReplicaCheckHook
from megatron_sgt.engine.hooks.spike import LossSpike, SpikeHook
from megatron_sgt.engine.hooks.straggler import StragglerHook
from megatron_sgt.engine.hooks.validation import EvalHook
from megatron_sgt.engine.hooks.watched import watched_batches, watched_hooks
from megatron_sgt.engine.loop import DivergedError, Trainer
from megatron_sgt.engine.run_folders import CONFIG_FILE, RunFolders
from megatron_sgt.engine.skipped_ranges import SkippedRanges, batches_outside
from megatron_sgt.engine.step import TrainState
from megatron_sgt.errors import CheckpointError, ConfigError, DamagedCheckpointError, ExitCode
from megatron_sgt.growth import Schedule
from megatron_sgt.growth.methods import with_schedule
from megatron_sgt.guard import Progress, Watch
from megatron_sgt.guard.stop import StopRequests, named
from megatron_sgt.launch.environment import RankInfo
from megatron_sgt.metrics import METRICS_FILE, MetricsHub, build_hub
from megatron_sgt.metrics.records import ResumeRecord, SummaryRecord
from megatron_sgt.model.loop_backend import loop_backend
from megatron_sgt.model.warm_up import warm_up_loops
from megatron_sgt.ops.attention import describe_attention
from megatron_sgt.parallel.collectives import barrier, on_rank_zero
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.planning.loop_cost import choose_loop_method
from megatron_sgt.planning.structure import most_kept_heads, schedule_of
from megatron_sgt.preflight import (
    Start,
    check_disk,
    check_surroundings,
    find_start,
    tokenizer_fingerprint,
    with_vocabulary,
)


class PretrainingRun:
    """The parts of one run, wired together; ``train`` runs it. Collective over all ranks.

    Args:
        schedule: a growth method of the caller's own, instead of the one that ``config`` names.
        hooks: of the user's own, beside those that train.hooks names. They act after the built-in ones, except
            for the comparison of the ranks and the saving, which come last; their states are in the checkpoints.

    Raises:
        ConfigError, DataError, CheckpointError: what the user can correct, before any training step.
    """

    def __init__(
        self,
        config: Config,
        info: RankInfo,
        stop: StopRequests | None = None,
        watch: Watch | None = None,
        schedule: type[Schedule] | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        if schedule is not None:
            config = with_schedule(config, schedule)
        self.stop = StopRequests(config.train) if stop is None else stop
        self.progress = Progress() if watch is None else watch.progress
        config.num_micro_batches(info.world_size)  # refuse the batch arithmetic before any process group
        check_surroundings(config)
        self.own_hooks = own_hooks(config, hooks)
        self.config = with_vocabulary(config)
        self.groups: ParallelGroups = start_processes(self.config, info)
        if watch is not None:
            watch.connect()
        self.folders = RunFolders(self.config)
        self.folders.take()
        try:
            self._prepare()
        except BaseException:
            self.folders.release()
            raise

    def _prepare(self) -> None:
        """All that comes before the first step, in folders that this run alone writes into."""
        # If every rank looked, they might see different folders on a network file system.
        self.start: Start = self._find_start(self._look_for_start)
        if self.groups.is_main:
            layout.clear_leftovers(self.config.save_dir)
        self.progress.enter("opening the data")
        datasets = self._open_data()
        self.data = self._compare_data()
        self.progress.enter("building the model")
        self.runtime: Runtime = build_runtime(self.config, self.groups)
        self.progress.enter("compiling the kernels of the loops")
        warm_up_loops(self.config, self.groups, self.runtime.precision)
        self.schedule = schedule_of(self.config)
        self.hub = self._open_hub()
        self.skipped_ranges: SkippedRanges = on_rank_zero(
            lambda: SkippedRanges.at_start(self.start.folder, self.config.save_dir)
        )
        self.state = TrainState()
        self._wire(datasets[1])
        if self.start.folder is not None:
            self.progress.enter("loading the checkpoint")
            loaded = self._load(self.start, self._look_for_start)
            if loaded is not self.start:  # an older one, which may have read other data
                self.start = loaded
                self.data = self._compare_data()
            self.state.consumed_samples = self.skipped_ranges.after(self.state.consumed_samples)
        self.saver.data = self.data.record
        self._report_start()
        self.train_data = datasets[0]

    def _load(self, start: Start, look: Callable[[dict[Path, str]], Start]) -> Start:
        """Load ``start``, or the newest checkpoint whose files can be read; returns which. Collective."""
        damaged: dict[Path, str] = {}
        while True:
            assert start.folder is not None, "without a whole one _find_start raises"
            try:
                self.saver.load(start.folder, start.saved, self.state)
                return start
            except DamagedCheckpointError as error:
                if start.explicit:
                    raise
                damaged[start.folder] = str(error)
            start = self._find_start(look, damaged)

    def _find_start(self, look: Callable[[dict[Path, str]], Start], damaged: dict[Path, str] | None = None) -> Start:
        """The newest whole checkpoint of the run; damaged ones are skipped. Collective.

        ``look``: finds one on rank 0, given those that are known to be ``damaged``.
        """
        damaged = {} if damaged is None else damaged
        while True:
            start = on_rank_zero(partial(look, damaged))
            if start.folder is None:
                return start
            problem = verify_together(start.folder, self.config, self.groups)
            if problem is None:
                return start
            if start.explicit:
                raise CheckpointError(problem)
            damaged[start.folder] = problem

    def _look_for_start(self, damaged: dict[Path, str]) -> Start:
        precision = self.config.precision_on(self.groups.device.type)
        check_deepspeed(self.config, self.groups.world_size, precision)
        check_disk(self.config, precision)
        return find_start(self.config, damaged)

    def _compare_data(self) -> DataStart:
        return on_rank_zero(lambda: data_start(self.config, self.start))

    def _open_data(self) -> Sequence[Any]:
        return build_datasets(self.config, tokenizer_of(self.config.data))

    def _open_hub(self) -> MetricsHub:
        """Rank 0's has the writers. What cannot be written at the start is refused, on all ranks."""
        opened: list[MetricsHub] = []
        on_rank_zero(lambda: opened.append(self._hub_of_rank_zero()))
        return opened[0] if opened else MetricsHub()

    def _hub_of_rank_zero(self) -> MetricsHub:
        shown = self.config.model_dump()
        try:
            self.folders.write_config()
            return build_hub(self.config.logging, self.config.train.train_iters, shown, self.folders.check)
        except OSError as error:
            raise ConfigError(
                f"logging.run_dir: cannot write to {self.config.logging.run_dir}: {error.strerror}; make room, or "
                "choose another folder"
            ) from error

    def _wire(self, valid: Any) -> None:
        """Build the hooks in the order in which they act: average, growth, report, validate, the user's own, save."""
        config, groups, runtime = self.config, self.groups, self.runtime
        self.log = LogHook(config, self.schedule, self.hub, groups, runtime.precision)
        self.growth = GrowthHook(self.schedule, runtime.model, runtime.model.meter, groups, self.log.on_growth)
        self.spike = SpikeHook(
            config.train, self.skipped_ranges, self._can_go_back, self.hub, groups, config.seq_lengths
        )
        self.straggler = StragglerHook(
            runtime.model, config.logging.log_interval, config.train.straggler_threshold, self.hub, groups
        )
        decay = config.train.ema_decay
        ema = EmaHook(runtime.engine, decay, groups) if decay else None
        self.hooks: list[Hook] = [self.spike, *([ema] if ema else []), self.growth, self.log, self.straggler]
        self.eval: EvalHook | None = None
        if config.train.eval_interval and valid is not None:
            loader = EvalLoader(
                valid,
                config.train.micro_batch_size,
                config.num_micro_batches(groups.world_size),
                groups.dp_rank,
                groups.dp_size,
                config.train.eval_iters,
                pin_memory=groups.device.type != "cpu",
            )
            interval = config.train.eval_interval
            self.eval = EvalHook(runtime.engine, loader, interval, self.schedule, self.hub, groups, ema)
            self.hooks.append(self.eval)
        parts = RunParts(config, groups, runtime.model, runtime.engine, self.schedule, self.hub)
        for hook in self.own_hooks:
            hook.attach(parts)
        self.hooks += self.own_hooks
        intervals = (config.train.replica_check_interval, config.checkpoint.save_interval)
        stage, root = runtime.engine.zero_optimization_stage(), config.save_dir
        self.hooks.append(ReplicaCheckHook(runtime.model, intervals, stage, groups, root))
        # Saving comes last, so that a checkpoint holds what the other hooks made of the step; what a hook has changed
        # on one rank alone is seen before.
        about = {"tokenizer": tokenizer_fingerprint(config) if groups.is_main else None}
        self.saver = CheckpointHook(
            config,
            runtime.engine,
            [self.growth, self.spike],
            self.hub,
            groups,
            about,
            self.own_hooks,
            self.folders.check,
            None if ema is None else ema.average,
        )
        self.saver.on_saved = self.stop.note_save
        self.hooks.append(self.saver)

    def _report_start(self) -> None:
        record: ResumeRecord = {
            "step": self.state.step,
            "path": self.start.folder,
            "searched": self.config.save_dir,
            "consumed_samples": self.state.consumed_samples,
            "changed": self.start.changed,
            "skipped": self.start.skipped,
        }
        self.hub.log("resume", record)
        if self.data.change is not None:
            self.hub.log("data", data_record(self.data.change, self.state.step))
        if self.groups.is_main and self.groups.tp_size > 1 and most_kept_heads(self.config):
            print(f"LOOPS  {choose_loop_method(self.config)[1]}", flush=True)
        line = loop_backend(self.config, self.runtime.precision, self.groups.device)[1]
        if self.groups.is_main and self.groups.device.type != "cpu":
            print(f"LOOPS  {line}; {describe_attention(self.groups.device)}", flush=True)

    def train(self) -> int:
        """Train to train_iters, exit_interval or a request to stop; report. Returns 0, or 75: to be started again."""
        train = self.config.train
        last_step = min(train.train_iters, train.exit_interval or train.train_iters)
        start = time.perf_counter()
        stopped = 0
        try:
            if self.state.step < last_step:
                reason = "finished" if last_step == train.train_iters else "stopped early (train.exit_interval)"
                if stopped := self._train_to(last_step):
                    reason = f"stopped ({named(stopped)}), start again to go on"
            else:
                option = "train_iters" if last_step == train.train_iters else "exit_interval"
                reason = f"nothing to do: raise train.{option} (now {last_step:,}) to go on"
            code = ExitCode.SAVED if stopped else ExitCode.DONE
            self._summarize(reason, code, time.perf_counter() - start)
            self.progress.enter("the end")
        except DivergedError:  # of all ranks, after the same step
            self.saver.settle(self.state)
            raise
        finally:
            self.hub.close()
            self.folders.release()
        # No rank takes another's exit for a loss, however long rank 0 takes to close its reports.
        barrier(self.groups)
        return code

    def _train_to(self, last_step: int) -> int:
        """Train; go back to a checkpoint as often as the loss spikes. Returns why it stopped early, 0 if not."""
        hooks = watched_hooks(self.hooks, self.progress)
        trainer = Trainer(self.config, self.groups, self.runtime.engine, self.state, hooks, self.stop)
        while True:
            batches = batches_outside(self._open_loader, self.skipped_ranges, self.state.consumed_samples)
            try:
                return trainer.run(self.straggler.timed(watched_batches(batches, self.progress)), last_step)
            except LossSpike as spike:
                self._go_back(spike)

    def _open_loader(self, consumed_samples: int) -> TrainLoader:
        return TrainLoader(
            self.train_data,
            self.config.train.micro_batch_size,
            self.config.num_micro_batches(self.groups.world_size),
            self.groups.dp_rank,
            self.groups.dp_size,
            consumed_samples,
            self.config.data.num_workers,
            pin_memory=self.groups.device.type != "cpu",
        )

    def _go_back(self, spike: LossSpike) -> None:
        """Load the newest checkpoint, and skip the data between it and the spike for good."""
        self.progress.enter("going back to a checkpoint")
        own = self.config.checkpoint.model_copy(update={"resume": "auto", "load": None})
        look = partial(find_start, self.config.model_copy(update={"checkpoint": own}))
        newest = self._find_start(look)
        if newest.folder is None:
            raise CheckpointError(f"no checkpoint in {self.config.save_dir} is whole; there is none to go back to")
        newest = self._load(newest, look)
        self.saver.data = record_at(newest.saved, self.saver.data)
        start = self.state.consumed_samples
        self.skipped_ranges.add(start, spike.stop)
        on_rank_zero(self._write_skipped_ranges)  # before a step is taken: a run that dies now must not forget it
        self.state.consumed_samples = self.skipped_ranges.after(start)
        there = {
            "step": self.state.step,
            "path": newest.folder,
            "consumed_samples": self.state.consumed_samples,
        }
        self.hub.log("resume", {**there, "searched": self.config.save_dir, "changed": ()})
        self.hub.log("rollback", {**there, **spike.record(), "passed_samples": spike.stop - start})

    def _write_skipped_ranges(self) -> None:
        self.folders.check()
        self.skipped_ranges.write()

    def _can_go_back(self) -> bool:
        """Collective."""
        self.saver.settle(self.state)
        return on_rank_zero(lambda: bool(layout.finished_tags(self.config.save_dir)))

    def _summarize(self, reason: str, code: ExitCode, seconds: float) -> None:
        run_dir = Path(self.config.logging.run_dir)
        record: SummaryRecord = {
            "step": self.state.step,
            "train_iters": self.config.train.train_iters,
            "reason": reason,
            "exit_code": int(code),
            "first_loss": self.log.first_loss if self.start.folder is None else None,
            "loss": self.log.last_loss,
            "valid_loss": None if self.eval is None else self.eval.last_loss,
            "growth_events": len(self.growth.events),
            "seconds": seconds,
            "consumed_tokens": self.state.consumed_samples * self.config.model.seq_length,
            "tokens_per_second": self.log.tokens_per_second,
            "paths": {
                "checkpoint": self.saver.last_path or self.start.folder,
                "metrics": run_dir / METRICS_FILE,
                "config": run_dir / CONFIG_FILE,
            },
        }
        if self.eval is not None and self.eval.last_ema_loss is not None:
            record["valid_ema_loss"] = self.eval.last_ema_loss
        self.hub.log("summary", record)
