"""A whole pretraining run: from a validated configuration to a summary."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.forms import read_state
from megatron_sgt.checkpoint.place import Place
from megatron_sgt.config import Config
from megatron_sgt.config.phases import Phase
from megatron_sgt.engine.build import Runtime
from megatron_sgt.engine.data_start import ledger_at
from megatron_sgt.engine.grow_record import grow_record
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.hooks.growth import GrowthHook
from megatron_sgt.engine.hooks.spike import LossSpike
from megatron_sgt.engine.loop import DivergedError, agreed_reason
from megatron_sgt.engine.phases import enter_phase
from megatron_sgt.engine.run_reports import report_end, report_start
from megatron_sgt.engine.session import Session
from megatron_sgt.engine.skipped_ranges import SkippedRanges, batches_outside
from megatron_sgt.engine.stage import RunningStage
from megatron_sgt.engine.start import Look, find_together, first_look, own_look, place_together
from megatron_sgt.engine.step import Batch
from megatron_sgt.errors import CheckpointError, DamagedCheckpointError, ExitCode
from megatron_sgt.growth import Schedule
from megatron_sgt.growth.methods import with_schedule
from megatron_sgt.guard import Watch
from megatron_sgt.guard.stop import Reason, StopRequests, named
from megatron_sgt.launch.environment import RankInfo
from megatron_sgt.metrics.records import GrowRecord
from megatron_sgt.parallel.collectives import barrier, on_rank_zero
from megatron_sgt.planning.parameters import checkpoint_bytes
from megatron_sgt.preflight import Start, check_export
from megatron_sgt.stages.stages import Stage


class PretrainingRun(Session):
    """The parts of one run, wired together; ``train`` runs it. Collective over all ranks.

    Between two stages of a model that grows, the engine of the old one is replaced by that of the new one. What passes
    from one to the other is in the checkpoint at the end of the old stage, so that a process that starts there goes on
    in the same way.

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
        super().__init__(config if schedule is None else with_schedule(config, schedule), info, stop, watch, hooks)
        self.phase: Phase | None = None
        try:
            self._prepare()
        except BaseException:
            self.folders.release()
            raise

    def _prepare(self) -> None:
        """All that comes before the first step, in folders that this run alone writes into."""
        if self.config.huggingface.check_at_start == "error":  # else it is said with the other reports
            on_rank_zero(lambda: check_export(self.config))
        look = first_look(self)
        self.start: Start = find_together(look, self)
        if self.groups.is_main:
            layout.clear_leftovers(self.config.save_dir)
        self.progress.enter("opening the data")
        self.open_data()
        data = self.start_data(self.start)
        self.stage = RunningStage(self, self._place(self.start).here)
        self.open_hub()
        behind = None if self.start.weights else self.start.folder
        self.skipped_ranges = on_rank_zero(lambda: SkippedRanges.at_start(behind, self.config.save_dir))
        self.stage.wire()
        grown: GrowRecord | None = None
        if self.start.folder is not None:
            loaded, grown = self._load(self.start, look)
            if loaded is not self.start:  # an older one, which may have read other data
                self.start = loaded
                data = self.start_data(loaded)
            self.state.consumed_samples = self.skipped_ranges.after(self.state.consumed_samples)
        report_start(self, self.stage, self.start, data.change)
        if grown is not None:
            self.hub.log("grow", grown)

    # What is read of the present stage from outside

    @property
    def runtime(self) -> Runtime:
        return self.stage.runtime

    @property
    def schedule(self) -> Schedule:
        return self.stage.schedule

    @property
    def hooks(self) -> list[Hook]:
        return self.stage.hooks

    @property
    def growth(self) -> GrowthHook:
        return self.stage.growth

    @property
    def last_step(self) -> int:
        """The last one of this process."""
        train = self.config.train
        return min(train.train_iters, train.exit_interval or train.train_iters)

    # From which checkpoint

    def _load(self, start: Start, look: Look) -> tuple[Start, GrowRecord | None]:
        """Load ``start``, or the newest checkpoint whose files can be read, into its stage; collective.

        Returns:
            Which, and the record of the growth that it was loaded through, if it was.
        """
        damaged: dict[Path, str] = {}
        while True:
            assert start.folder is not None, "without a whole one find_together raises"
            place = self._place(start)
            # An engine that has trained is not used for a growth: it would be the only one that is not new there.
            if place.here is not self.stage.stage or (place.grows and self.stage.has_trained):
                self._replace(place.here)
            try:
                return start, self._load_at(place, start)
            except DamagedCheckpointError as error:
                if start.explicit:
                    raise
                damaged[start.folder] = str(error)
            start = find_together(look, self, damaged)

    def _place(self, start: Start) -> Place:
        """Where ``start`` lies among the stages; the model does not grow if no step is left to train. Collective."""
        place = place_together(start, self.config, self.stages)
        if start.folder is not None and start.saved["trainer"]["step"] >= self.last_step:
            return Place(place.there, place.there)
        return place

    def _load_at(self, place: Place, start: Start, before: float | None = None) -> GrowRecord | None:
        """Load the checkpoint of ``start`` into the present stage; ``before``: loss of the probe in the old one."""
        assert start.folder is not None
        begun = time.perf_counter()
        notes = self.stage.load(start.folder, start.saved, place, start.weights)
        if not place.grows:
            return None
        after = self.stage.probe_loss(self.stage.probe_batches())
        seconds = time.perf_counter() - begun
        return grow_record(place, start.saved, self.schedule, notes, (before, after), seconds, self.pairs)

    # Training

    def train(self) -> int:
        """Train to train_iters, exit_interval or a request to stop; report. Returns 0, or 75: to be started again."""
        train, last_step = self.config.train, self.last_step
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
            report_end(self, self.stage, self.start, reason, code, time.perf_counter() - start)
            self.progress.enter("the end")
        except DivergedError:  # of all ranks, after the same step
            self.stage.saver.settle(self.state)
            raise
        finally:
            self.hub.close()
            self.folders.release()
        # No rank takes another's exit for a loss, however long rank 0 takes to close its reports.
        barrier(self.groups)
        return code

    def _train_to(self, last_step: int) -> int:
        """Train stage by stage, phase by phase; go back to a checkpoint as often as the loss spikes.

        Returns:
            Why it stopped early, 0 if not.
        """
        going_on = False
        while True:
            end = min(self.stage.stage.last, last_step, self._enter_part())
            spike = None
            try:
                if stopped := self.stage.train(self._batches(), end, end < last_step, going_on):
                    return stopped
            except LossSpike as error:
                spike = error.with_traceback(None)  # which refers to the engine, and an older stage may be built
            going_on = spike is None and end < self.stage.stage.last
            if spike is not None:
                self._go_back(spike)
            elif end == last_step:
                return 0
            elif not going_on and (stopped := self._grow()):
                return stopped

    def _enter_part(self) -> int:
        """Make the next step that of its phase; returns the last step with its phase and its batch size."""
        step = self.state.step + 1
        phase = self.config.phase_at(step)
        if phase is not None and phase != self.phase:
            enter_phase(self, self.stage, phase)
            self.phase = phase
        return self.config.batches.last_of(step)

    def _batches(self) -> Iterator[Batch]:
        return batches_outside(self.open_loader, self.skipped_ranges, self.state.consumed_samples)

    def _grow(self) -> int:
        """Go on with the next stage, from the checkpoint that the present one has just ended with.

        Returns:
            Why the run stops here, 0 if it goes on. All that it needs to go on later is in that checkpoint.
        """
        begun = time.perf_counter()
        stage, folder = self.stage.stage, self.stage.saver.last_path
        assert folder is not None, "after_stage saves, or raises"
        before = self.stage.probe_loss(self.stage.probe_batches())
        if stopped := self._stopped():
            return stopped
        self._replace(self.stages[stage.index + 1])
        if stopped := self._stopped():
            return stopped
        start = Start(folder, on_rank_zero(lambda: read_state(folder)))
        record = self._load_at(Place(stage, self.stage.stage), start, before)
        assert record is not None
        record["seconds"] = time.perf_counter() - begun
        self.hub.log("grow", record)
        return 0

    def _stopped(self) -> int:
        """As ``Trainer`` asks, but no hook is told: the new engine, whose weights are not loaded, must not be saved.

        A request to save is met by the checkpoint that the old one has just written.
        """
        reason = agreed_reason(self.stop, self.groups)
        if reason == Reason.SAVE_NOW:
            return 0
        if reason:
            self.hub.log("stop", {"step": self.state.step, "reason": named(reason)})
        return reason

    def _replace(self, stage: Stage) -> None:
        """Build ``stage`` in the place of the present one."""
        before, precision = self.stage.measured(), self.stage.runtime.precision
        old, new = (checkpoint_bytes(one.config, precision) for one in (self.stage.stage, stage))
        self.stop.expect_saves(new / old)
        self.stage.close()
        self.stage = RunningStage(self, stage)
        self.stage.wire(before)

    def _go_back(self, spike: LossSpike) -> None:
        """Load the newest checkpoint, of an earlier stage if need be, and skip the data up to the spike for good."""
        self.progress.enter("going back to a checkpoint")
        look = own_look(self)
        newest = find_together(look, self)
        if newest.folder is None:
            raise CheckpointError(f"no checkpoint in {self.config.save_dir} is whole; there is none to go back to")
        newest, grown = self._load(newest, look)
        data, ledger = self.data, self.ledger
        assert data is not None
        self.ledger = on_rank_zero(lambda: ledger_at(newest.saved, ledger, data))
        self.turn_blend(self.config.data_path_at(self.state.step))
        start = self.state.consumed_samples
        self.skipped_ranges.add(start, spike.stop)
        on_rank_zero(self.write_skipped_ranges)  # before a step is taken: a run that dies now must not forget it
        self.state.consumed_samples = self.skipped_ranges.after(start)
        there = {
            "step": self.state.step,
            "path": newest.folder,
            "consumed_samples": self.state.consumed_samples,
        }
        consumed_tokens = self.ledger.tokens(self.state.consumed_samples)
        self.hub.log(
            "resume", {**there, "consumed_tokens": consumed_tokens, "searched": self.config.save_dir, "changed": ()}
        )
        self.hub.log("rollback", {**there, **spike.record(), "passed_samples": spike.stop - start})
        if grown is not None:
            self.hub.log("grow", grown)
