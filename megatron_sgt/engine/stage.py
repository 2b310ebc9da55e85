"""One stage of a run, built: its model, its engine, and the hooks that act on them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.place import Place
from megatron_sgt.compat.release import release_engine
from megatron_sgt.data.loader import EvalLoader, TrainLoader
from megatron_sgt.data.sources import eval_samples
from megatron_sgt.engine.build import Runtime, build_runtime
from megatron_sgt.engine.hooks.base import Hook, RunParts
from megatron_sgt.engine.hooks.checkpoint import CheckpointHook
from megatron_sgt.engine.hooks.ema import EmaHook
from megatron_sgt.engine.hooks.growth import GrowthHook
from megatron_sgt.engine.hooks.log import LogHook
from megatron_sgt.engine.hooks.ramp import RampHook
from megatron_sgt.engine.hooks.replicas import ReplicaCheckHook
from megatron_sgt.engine.hooks.spike import SpikeHook
from megatron_sgt.engine.hooks.straggler import LagRule, StragglerHook
from megatron_sgt.engine.hooks.tasks import TasksHook
from megatron_sgt.engine.hooks.validation import EvalHook
from megatron_sgt.engine.hooks.watched import watch_passes, watched_batches, watched_hooks
from megatron_sgt.engine.live_tasks import live_model
from megatron_sgt.engine.loop import Trainer
from megatron_sgt.engine.session import Session
from megatron_sgt.engine.step import Batch
from megatron_sgt.evaluation.perplexity import mean_loss
from megatron_sgt.evaluation.text_bytes import TextBytes
from megatron_sgt.evaluation.validation_set import ValidationSet
from megatron_sgt.growth import LoopPlan
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.ramp import RampMask
from megatron_sgt.model.warm_up import warm_up_loops
from megatron_sgt.parallel.collectives import on_rank_zero
from megatron_sgt.parallel.device import empty_caches
from megatron_sgt.planning.structure import schedule_of
from megatron_sgt.stages.stages import Stage


@dataclass(frozen=True)
class Measured:
    """What the reports of a stage go on with from those of the one before."""

    first_loss: float | None
    last_loss: float | None
    valid_loss: float | None
    valid_ema_loss: float | None
    valid_losses: dict[str, float]
    tokens_per_second: float | None
    lags: dict[str, LagRule]
    last_path: Path | None
    growth_events: list[dict[str, Any]]


class RunningStage:
    """The parts of one stage, wired together. Collective over all ranks.

    After ``wire`` its ``hooks`` are in the order in which they act: average, ramp, growth, report, validate, the user's
    own, save. ``eval`` is None where nothing is validated.
    """

    def __init__(self, session: Session, stage: Stage) -> None:
        self.session = session
        self.stage = stage
        self.config = stage.config
        session.progress.enter("building the model")
        session.progress.model_built()
        self.runtime: Runtime = build_runtime(self.config, session.groups)
        session.progress.enter("compiling the kernels of the loops")
        warm_up_loops(self.config, session.groups, self.runtime.precision)
        self.schedule = schedule_of(self.config)
        self.hooks: list[Hook] = []
        self.has_trained = False

    def wire(self, before: Measured | None = None) -> None:
        """Build the hooks, once the session has a hub. ``before``: of the stage that this one follows, if it does."""
        session, config, groups, runtime = self.session, self.config, self.session.groups, self.runtime
        hub = session.hub
        self.log = LogHook(config, self.schedule, hub, groups, runtime.precision, session.pairs)
        self.log.tokens_of = lambda consumed: session.ledger.tokens(consumed)
        self.growth = GrowthHook(self.schedule, runtime.model, runtime.model.meter, groups, self.log.on_growth)
        self.spike = SpikeHook(
            config.train, session.skipped_ranges, self._can_go_back, hub, groups, config.part_begins_at
        )
        self.straggler = StragglerHook(
            runtime.model, config.logging.log_interval, config.train.straggler_threshold, hub, groups
        )
        decay = config.train.ema_decay
        ema = EmaHook(runtime.engine, decay, groups) if decay else None
        ramp = config.growth.ramp
        self.ramp = None if ramp is None else RampHook(ramp, RampMask(runtime.model, config, groups))
        before_growth = [hook for hook in (ema, self.ramp) if hook is not None]
        self.hooks = [self.spike, *before_growth, self.growth, self.log, self.straggler]
        self.eval: EvalHook | None = None
        sets = self._validation_sets() if config.train.eval_interval else []
        if sets:
            train = config.train
            self.eval = EvalHook(
                runtime.engine, sets, train.eval_interval, self.schedule, hub, ema, train.eval_at_start
            )
            self.hooks.append(self.eval)
        if config.evaluation.tasks:
            self.hooks.append(self._tasks_hook(ema))
        if groups.pp_size > 1:
            watch_passes(runtime.model, session.progress)
        self.parts = RunParts(config, groups, runtime.model, runtime.engine, self.schedule, hub)
        for hook in session.own_hooks:
            hook.attach(self.parts)
        self.hooks += session.own_hooks
        intervals = (config.train.replica_check_interval, config.checkpoint.save_interval)
        zero, root = runtime.engine.zero_optimization_stage(), config.save_dir
        self.hooks.append(ReplicaCheckHook(runtime.model, intervals, zero, groups, root))
        # Saving comes last, so that a checkpoint holds what the other hooks made of the step; what a hook has changed
        # on one rank alone is seen before.
        self.saver = self._saver(ema)
        self.hooks.append(self.saver)
        if before is not None:
            self._go_on_from(before)

    def _tasks_hook(self, ema: EmaHook | None) -> TasksHook:
        session, config, engine = self.session, self.config, self.runtime.engine
        alive = partial(session.progress.enter, TasksHook.name)
        live = live_model(config, engine, session.groups, session.tokenizer, alive)
        interval = config.evaluation.tasks_interval
        return TasksHook(engine, live, session.run_tasks, interval, self.schedule, session.hub, session.groups, ema)

    def _validation_sets(self) -> list[ValidationSet]:
        """The validation split, which is read from its beginning again where it ends early, and data.valid."""
        session, train = self.session, self.config.train
        per_step = train.global_batch_size
        counter = None if session.tokenizer is None else TextBytes(session.tokenizer)
        kept: list[tuple[str | None, Any]] = [(None, session.valid_data)] if session.valid_data is not None else []
        found = []
        for name, data in [*kept, *session.valid_sets.items()]:
            samples = train.eval_iters * per_step if name is None else eval_samples(self.config, len(data))
            loader = self._eval_loader(data, -(-samples // per_step), None if name is None else samples)
            size = samples if name is None else len(data)
            alive = partial(session.progress.enter, EvalHook.name)
            found.append(ValidationSet(name, loader, samples, size, session.groups, counter, alive))
        return found

    def _eval_loader(self, data: Any, steps: int, samples: int | None) -> EvalLoader:
        train, groups = self.config.train, self.session.groups
        return EvalLoader(
            data,
            train.micro_batch_size,
            self.config.num_micro_batches(groups.world_size),
            groups.dp_rank,
            groups.dp_size,
            steps,
            pin_memory=groups.device.type != "cpu",
            num_samples=samples,
        )

    def _saver(self, ema: EmaHook | None) -> CheckpointHook:
        session = self.session
        saver = CheckpointHook(
            self.config,
            self.runtime.engine,
            [self.growth, self.spike, *session.own_hooks],
            session.hub,
            session.groups,
            session.about,
            session.own_at_first(),
            session.folders.check,
            None if ema is None else ema.average,
            self.growth.verify,
        )
        saver.stage_end = self.stage.last if self.stage is not session.stages[-1] else None
        saver.stages = [stage.record() for stage in session.stages[1 : self.stage.index + 1]]
        saver.data = lambda: session.ledger.to_json()
        saver.progress = lambda consumed: session.ledger.progress(consumed)
        saver.on_saved = session.stop.note_save
        return saver

    def _go_on_from(self, before: Measured) -> None:
        self.log.first_loss, self.log.last_loss = before.first_loss, before.last_loss
        self.log.tokens_per_second = before.tokens_per_second
        self.straggler.rules = before.lags
        self.saver.last_path = before.last_path
        self.growth.events = before.growth_events
        if self.eval is not None:
            self.eval.last_loss, self.eval.last_ema_loss = before.valid_loss, before.valid_ema_loss
            self.eval.last_losses = before.valid_losses

    def measured(self) -> Measured:
        """For the reports of the stage that follows, and for the summary."""
        return Measured(
            self.log.first_loss,
            self.log.last_loss,
            None if self.eval is None else self.eval.last_loss,
            None if self.eval is None else self.eval.last_ema_loss,
            {} if self.eval is None else self.eval.last_losses,
            self.log.tokens_per_second,
            self.straggler.rules,
            self.saver.last_path,
            self.growth.events,
        )

    def load(self, folder: Path, saved: dict[str, Any], place: Place, weights: str | None = None) -> list[str]:
        """Continue from a checked checkpoint; see ``CheckpointHook.load``."""
        self.session.progress.enter("growing the model" if place.grows else "loading the checkpoint")
        notes = self.saver.load(folder, saved, self.session.state, place, weights)
        if self.ramp is not None:  # for losses that are measured before the first step
            self.ramp.before_run(self.session.state)
        return notes

    def train(self, batches: Iterator[Batch], last_step: int, between: bool, going_on: bool = False) -> int:
        """See ``Trainer.run``."""
        session, self.has_trained = self.session, True
        hooks = watched_hooks(self.hooks, session.progress)
        engine, stages = self.runtime.engine, session.stages
        trainer = Trainer(self.config, session.groups, engine, session.state, hooks, session.stop, stages)
        timed = self.straggler.timed(watched_batches(batches, session.progress))
        return trainer.run(timed, last_step, between, going_on)

    def probe_batches(self) -> list[Batch]:
        """The first micro-batch of validation, else of what is trained next, for losses before and after growth."""
        session, train = self.session, self.config.train
        valid = session.valid_data
        start = session.state.consumed_samples if valid is None else 0
        data, groups = session.train_data if valid is None else valid, session.groups
        count = self.config.num_micro_batches(groups.world_size)
        loader = TrainLoader(data, train.micro_batch_size, count, groups.dp_rank, groups.dp_size, start)
        return list(islice(loader, 1))

    def probe_loss(self, batches: list[Batch]) -> float:
        """Mean loss of ``batches`` on all ranks, with the structure that inference uses; collective."""
        self.session.progress.enter("measuring the loss before and after growth")
        apply_plan(self.runtime.model, self.schedule.plan.inference())
        loss = mean_loss(self.runtime.engine, batches, self.session.groups)
        apply_plan(self.runtime.model, self.schedule.plan)
        return loss

    def _can_go_back(self) -> bool:
        """Collective."""
        self.saver.settle(self.session.state)
        return on_rank_zero(lambda: bool(layout.finished_tags(self.config.save_dir)))

    def close(self) -> None:
        """Free the model, the engine and what they hold, of which nothing can be used any more.

        The caller must hold no other part of this stage.
        """
        self.session.progress.enter("releasing the model")
        apply_plan(self.runtime.model, LoopPlan.empty(self.config.model.num_layers))
        self.parts.release()
        self.saver.saver.close()
        release_engine(self.runtime.engine)
        session = self.session
        vars(self).clear()
        gc.collect()
        empty_caches(session.groups.device)
