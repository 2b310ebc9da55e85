"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import deepspeed

from megatron_sgt.config import Config
from megatron_sgt.engine.accumulation import accumulate
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.loss_scale import SkipRule
from megatron_sgt.engine.step import Batch, StepResult, TrainState, train_step
from megatron_sgt.errors import SGTError
from megatron_sgt.guard.stop import Reason, StopRequests
from megatron_sgt.optim.schedule import rate_of_run
from megatron_sgt.parallel.collectives import any_rank, largest
from megatron_sgt.parallel.groups import ParallelGroups
from megatron_sgt.stages.stages import Stage, stages_of


class DivergedError(SGTError):
    """Too many steps in a row without a finite gradient, at any loss scale."""


@dataclass
class Trainer:
    """What the loop drives: engine, counters, hooks in the order in which they act.

    ``stages``: all of the run, for its learning rates; None: ``config`` is the run's own, and has one stage.
    """

    config: Config
    groups: ParallelGroups
    engine: deepspeed.DeepSpeedEngine
    state: TrainState
    hooks: Sequence[Hook]
    stop: StopRequests
    stages: Sequence[Stage] | None = None

    def run(self, micro_batches: Iterator[Batch], last_step: int, between: bool = False, going_on: bool = False) -> int:
        """Train until optimizer step ``last_step``, or until a request to stop, with the batch size of the first step.

        Args:
            micro_batches: this rank's micro-batches in data order, starting at ``state.consumed_samples``.
            between: the next stage or phase, or another batch size, follows, and not the end of the run.
            going_on: the same stage was trained up to here, so that the hooks have begun already.

        Returns:
            0 at ``last_step``; the reason for which all ranks have stopped before (see guard/stop.py).

        Raises:
            DivergedError: train.max_consecutive_skipped_steps steps in a row were skipped, not counting those that
                fp16's search for its loss scale explains. Nothing was saved since the last good step.
        """
        train = self.config.train
        lengths, size = self.config.seq_lengths, self.config.batches.at(self.state.step + 1)
        accumulation = self.config.num_micro_batches(self.groups.world_size, size)
        accumulate(self.engine, accumulation)
        stages = stages_of(self.config) if self.stages is None else self.stages
        for hook in () if going_on else self.hooks:
            hook.before_run(self.state)
        self.engine.train()
        skips = SkipRule(self.engine)
        self.stop.training = True
        ended = time.perf_counter()
        while self.state.step < last_step:
            if reason := self._stopped():
                return reason
            lr = rate_of_run(self.state.step + 1, stages)
            batches = (next(micro_batches) for _ in range(accumulation))
            skips.before_step()
            pieces = lengths.pieces_at(self.state.step + 1)
            result = train_step(self.engine, batches, lr, self.config.optim.clip_grad, self.groups, pieces)
            now = time.perf_counter()
            result, ended = replace(result, seconds=now - ended), now
            self.state.consumed_samples += size
            self._count(result.applied)
            skips.after_step(result.applied, not self._lost(result, skips))
            ended += self._after_step(result)
            if skips.unexplained >= train.max_consecutive_skipped_steps:
                raise DivergedError(
                    f"{self.state.consecutive_skipped} steps in a row after step {self.state.step} had no finite "
                    f"gradient (last loss {_shown(result.loss.item())}); the newest checkpoint is older than "
                    "these. Resume from it with a lower optim.lr, or with another train.seed to pass over the data"
                )
        if any(stage.last == last_step for stage in stages[:-1]):  # also where train.exit_interval ends the run there
            for hook in self.hooks:
                hook.after_stage(self.state)
        if between:
            return self._stopped()
        for hook in self.hooks:
            hook.after_run(self.state)
        return 0

    def _after_step(self, result: StepResult) -> float:
        """Let the hooks act; return the seconds for which they have held training up."""
        paused = 0.0
        for hook in self.hooks:
            begun = time.perf_counter()
            hook.after_step(self.state, result)
            if hook.pauses:
                paused += time.perf_counter() - begun
        return paused

    def _stopped(self) -> int:
        """The reason for which all ranks stop now, once the hooks know of it; 0 if they go on; collective."""
        reason = agreed_reason(self.stop, self.groups)
        for hook in self.hooks if reason else ():
            if reason == Reason.SAVE_NOW:
                hook.on_save_now(self.state)
            else:
                hook.on_stop(self.state, reason)
        return 0 if reason == Reason.SAVE_NOW else reason

    def _lost(self, result: StepResult, skips: SkipRule) -> bool:
        """Whether a skipped step's loss was not finite on some rank; collective if that matters."""
        if result.applied or not skips.needs_loss:
            return False
        return any_rank(not math.isfinite(result.loss.item()), self.groups)

    def _count(self, applied: bool) -> None:
        if applied:
            self.state.step += 1
            self.state.consecutive_skipped = 0
        else:
            self.state.skipped_steps += 1
            self.state.consecutive_skipped += 1


def agreed_reason(stop: StopRequests, groups: ParallelGroups) -> int:
    """The reason for which all ranks stop, or save, now; 0 if they just go on; collective.

    One all-reduce of 4 bytes, read on the host. The step before ended with the host reading its gradient norm, so that
    on a GPU no queued work delays this.
    """
    reason = largest(stop.pending(), groups)
    if reason and stop.trigger is not None:
        stop.trigger.take()
    if reason > Reason.SAVE_NOW:
        stop.on_agreed(reason)
    return reason


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)
