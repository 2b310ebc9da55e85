"""Saving every so many steps, when asked and at the end; loading before the first step."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed

from megatron_sgt.checkpoint.find import starts_fresh
from megatron_sgt.checkpoint.layout import (
    AVERAGE_STATE,
    DATA_STATE,
    IMPORTED_STATE,
    ORIGIN_STATE,
    STAGES_STATE,
    parse_json,
)
from megatron_sgt.checkpoint.load import grown_state, load_checkpoint, load_grown, load_weights
from megatron_sgt.checkpoint.place import Place
from megatron_sgt.checkpoint.save import Saver
from megatron_sgt.config import Config
from megatron_sgt.data.ledger import Progress
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.hooks.replicas import verify_loaded
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError, SGTError
from megatron_sgt.metrics import MetricsHub
from megatron_sgt.metrics.records import SaveRecord
from megatron_sgt.optim.ema import WeightAverage
from megatron_sgt.parallel.collectives import gather_or_raise, on_rank_zero
from megatron_sgt.parallel.groups import ParallelGroups


class CheckpointHook(Hook):
    """Saves the engine, the counters, ``average`` and the state of ``hooks``.

    After a skipped step nothing is saved until a step has been applied again: a checkpoint is never written
    in the middle of a divergence. A save at the interval that fails (a full disk) is reported and retried at the
    next one; the last save of a run must succeed.

    ``at_first``: by name, the states of the user's hooks before the first step, for checkpoints that do not hold them.
    ``verify``: raises where what is to be saved must not be; collective.
    """

    name = "checkpoint"
    pauses = True

    def __init__(
        self,
        config: Config,
        engine: deepspeed.DeepSpeedEngine,
        hooks: Sequence[Hook],
        hub: MetricsHub,
        groups: ParallelGroups,
        about: dict[str, Any] | None = None,
        at_first: Mapping[str, dict[str, Any]] | None = None,
        may_write: Callable[[], None] = lambda: None,
        average: WeightAverage | None = None,
        verify: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.engine = engine
        self.hooks = hooks
        self.at_first = at_first or {}
        self.hub = hub
        self.groups = groups
        self.average = average
        self.verify = verify
        self.saver = Saver(config, engine, groups, about, may_write, average)
        self.last_path: Path | None = None
        self.on_saved: Callable[[float], None] = lambda seconds: None
        self._saved_at = -1
        self._asked, self._asked_at = False, -1
        self.stage_end: int | None = None
        """After this step comes ``after_stage``, which saves whatever the interval is."""
        self.data: Callable[[], list[dict[str, Any]]] = list
        """What the run has read of its data so far (data/ledger.py)."""
        self.progress: Callable[[int], dict[str, Progress]] = lambda consumed_samples: {}
        """How far the run has come in each source of its data."""
        self._sources: dict[str, Progress] = {}
        self.stages: list[dict[str, Any]] = []
        """How the stages of the run began, up to the present one (stages/stages.py)."""
        self.imported: dict[str, Any] = {}
        """What the exports of an imported model keep."""
        self.origin: dict[str, Any] = {}
        """With whose weights the run began (checkpoint/new_run.py)."""

    def before_run(self, state: TrainState) -> None:
        """A checkpoint that was just loaded need not be written again."""
        self._saved_at = state.step if state.step else -1
        if self.config.checkpoint.save_interval:
            self.saver.prepare()

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Save at the interval, and when asked to; look after the save in flight."""
        interval = self.config.checkpoint.save_interval
        due = self._asked or (interval and state.step % interval == 0)
        try:
            self._poll(wait=False)
            if result.applied and due:
                self._asked_at, self._asked = state.step if self._asked else self._asked_at, False
            if result.applied and due and state.step != self.stage_end:
                self._poll(wait=True)
                self._start(state)
                self._poll(wait=not self.config.checkpoint.async_save)
        except CheckpointError as error:
            again = f"the next try is at step {_next(state.step, interval):,}" if interval else "ask again"
            reason = f"{error} (training goes on, {again})"
            self.hub.log("save_failed", {"step": state.step, "reason": reason})

    def after_run(self, state: TrainState) -> None:
        """Save the end of the run.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.settle(state)
        gone = on_rank_zero(lambda: self.last_path is not None and not self.last_path.exists())  # deleted meanwhile
        if (gone or self._saved_at != state.step) and state.consecutive_skipped == 0:
            self._start(state)
            self._poll(wait=True)

    def after_stage(self, state: TrainState) -> None:
        """Save the end of the stage, of which the next one is made, with what the other hooks have made of it.

        Raises:
            CheckpointError: it cannot be written.
        """
        self.after_run(state)

    def settle(self, state: TrainState) -> None:
        """Wait for the save in flight, if there is one; report it if it fails. Collective."""
        try:
            self._poll(wait=True)
        except CheckpointError as error:
            self.hub.log("save_failed", {"step": state.step, "reason": str(error)})

    def on_stop(self, state: TrainState, reason: int) -> None:
        """Save what was reached. Before the first step there is nothing to save."""
        if state.step:
            self.after_run(state)

    def on_save_now(self, state: TrainState) -> None:
        self._asked = True

    def _start(self, state: TrainState) -> None:
        self.verify()
        hooks: dict[str, Any] = {}
        gather_or_raise(lambda: hooks.update({hook.name: _saved_state(hook) for hook in self.hooks}), self.groups)
        saved = {"trainer": state.state_dict(), "hooks": hooks, DATA_STATE: self.data()}
        if self.stages:
            saved[STAGES_STATE] = self.stages
        if self.imported:
            saved[IMPORTED_STATE] = self.imported
        if self.origin:
            saved[ORIGIN_STATE] = self.origin
        self._sources = self.progress(state.consumed_samples)
        self.saver.start(state.step, saved)

    def _poll(self, wait: bool) -> None:
        saved = self.saver.poll(wait)
        if saved is None:
            return
        self.last_path, self._saved_at = saved.folder, saved.step
        self.on_saved(saved.seconds)
        record: SaveRecord = {
            "step": saved.step,
            "path": saved.folder,
            "seconds": saved.seconds,
            "stall_s": saved.stall_s,
            "bytes": saved.num_bytes,
            "source_tokens": {name: one.tokens for name, one in self._sources.items()},
            "source_epochs": {name: one.epochs for name, one in self._sources.items()},
        }
        if saved.step == self._asked_at:
            record["asked"] = True
        self.hub.log("save", record)

    def load(
        self,
        folder: Path,
        saved: dict[str, Any],
        state: TrainState,
        place: Place | None = None,
        weights: str | None = None,
    ) -> list[str]:
        """Continue from the checked checkpoint ``folder`` whose state is ``saved``; collective.

        Args:
            place: where it lies among the stages of the run; None: in the only one.
            weights: begin a new run, whose state is ``saved``, with the weights of ``folder`` alone: see
                ``load_weights``; None: the run goes on.

        Returns:
            What a user should know of the growth of the model, if it grows here; one line each.

        Raises:
            CheckpointError: the checkpoint does not fit this run, or copies of a weight differ.
            ConfigError: the schedule cannot go on in the grown model.
            DamagedCheckpointError: its files cannot be read; no weight has been touched.
        """
        notes, note = list[str](), None
        if weights is not None:
            load_weights(folder, weights, self.config, self.engine, self.groups, self.average)
        elif place is None or not place.grows:
            note = load_checkpoint(folder, saved, self.config, self.engine, self.groups, self.average)
        else:
            grown, notes = grown_state(saved, place)
            note = load_grown(folder, saved, place, self.engine, self.groups, self.average)
            saved = grown
        verify_loaded(self.engine, folder, saved, self.groups)
        if note is not None:
            self._say("RESHARD", note)
        if self.average is not None and AVERAGE_STATE not in saved:
            self._say("EMA", "the checkpoint holds no average of the weights: it starts from the checkpoint's weights")
        elif self.average is None and AVERAGE_STATE in saved:
            self._say("EMA", "the checkpoint holds an average of the weights: it is dropped, as train.ema_decay is 0")
        state.load_state_dict(saved["trainer"])
        self.imported, self.origin = saved.get(IMPORTED_STATE, {}), saved.get(ORIGIN_STATE, {})
        self._restore_hooks(folder, saved)
        return notes

    def _restore_hooks(self, folder: Path, saved: dict[str, Any]) -> None:
        kept = saved["hooks"]
        for hook in self.hooks:
            if starts_fresh(saved, hook.name):
                continue
            missing = hook.name not in kept and hook.state_dict()
            if missing and hook.name not in self.at_first:
                raise CheckpointError(f"checkpoint {folder} holds no state of {hook.name!r}")
            if missing:
                self._say("HOOKS", f"the checkpoint holds no state of {hook.name!r}: it starts with this run")
            first = copy.deepcopy(self.at_first.get(hook.name, {}))
            try:
                hook.load_state_dict(kept.get(hook.name, first))
            except (AttributeError, LookupError, OverflowError, TypeError, ValueError) as error:
                what = f"checkpoint {folder}: the state of {hook.name!r} cannot be read"
                raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error
        for name in sorted(kept.keys() - {hook.name for hook in self.hooks}):
            self._say(
                "HOOKS", f"the checkpoint holds the state of {name!r}, which this run does not have: it is dropped"
            )

    def _say(self, label: str, note: str) -> None:
        if self.groups.is_main:
            print(f"{label}  {note}", flush=True)


def _saved_state(hook: Hook) -> dict[str, Any]:
    """A copy of a hook's state.

    Raises:
        SGTError: it is no dict, or cannot be written as JSON. No CheckpointError, after which training goes on: no
            later save could succeed.
    """
    state = copy.deepcopy(hook.state_dict())
    if not isinstance(state, dict):
        raise SGTError(f"the state of hook {hook.name!r} is a {type(state).__name__}, not a dict")
    try:
        parse_json(json.dumps(state))
    except (TypeError, ValueError) as error:
        raise SGTError(f"the state of hook {hook.name!r} is not JSON-able: {error}") from error
    return state


def _next(step: int, interval: int) -> int:
    return (step // interval + 1) * interval
