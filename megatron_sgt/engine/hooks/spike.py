"""Loss spikes: how one is distinguished from noise, and what follows.

A loss more than n standard deviations above the mean of the last accepted losses means that this batch, or those
before it, did harm. The run goes back to its newest checkpoint (weights, optimizer, growth, random streams) while
the data continues after the spike, as was done by hand for PaLM (arXiv 2204.02311, section 5.1).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from megatron_sgt.config.run import TrainConfig
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.loop import DivergedError
from megatron_sgt.engine.skipped_ranges import SkippedRanges
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError
from megatron_sgt.metrics import MetricsHub
from megatron_sgt.parallel.collectives import any_rank, mean_over_data_parallel
from megatron_sgt.parallel.groups import ParallelGroups


class LossSpike(Exception):
    """Asks the run to go back. ``step``: the step with the spike; ``stop``: where the data continues after it."""

    def __init__(self, step: int, loss: float, limit: float, stop: int) -> None:
        super().__init__(f"loss {loss:.4f} of step {step} is above {limit:.4f}")
        self.step = step
        self.loss = loss
        self.limit = limit
        self.stop = stop

    def record(self) -> dict[str, Any]:
        return {"spike_step": self.step, "loss": self.loss, "limit": self.limit}


class SpikeRule:
    """Keeps the last ``window`` accepted losses; judges only when there are that many."""

    def __init__(self, sigma: float, window: int) -> None:
        self.sigma = sigma
        self.losses: deque[float] = deque(maxlen=window)

    def limit(self) -> float:
        """mean + sigma · standard deviation (of the population) of the window; infinite until it is full."""
        count = len(self.losses)
        if count < (self.losses.maxlen or 0):
            return math.inf
        mean = math.fsum(self.losses) / count
        variance = math.fsum((loss - mean) ** 2 for loss in self.losses) / count
        return mean + self.sigma * math.sqrt(variance)

    def accept(self, loss: float) -> None:
        self.losses.append(loss)


class SpikeHook(Hook):
    """Comes before all other hooks: they must not see a step that will be undone.

    It also moves the count of consumed samples past the skipped ranges, as the data itself does.

    Args:
        begins_at: whether the losses from a step on are of another kind than those before it.
    """

    name = "spike"

    def __init__(
        self,
        config: TrainConfig,
        skipped: SkippedRanges,
        can_go_back: Callable[[], bool],
        hub: MetricsHub,
        groups: ParallelGroups,
        begins_at: Callable[[int], bool],
    ) -> None:
        self.config = config
        self.begins_at = begins_at
        self.skipped_ranges = skipped
        self.can_go_back = can_go_back
        self.hub = hub
        self.groups = groups
        self.rule: SpikeRule | None = None
        if config.spike_sigma is not None:
            self.rule = SpikeRule(config.spike_sigma, config.spike_window_steps)

    def after_step(self, state: TrainState, result: StepResult) -> None:
        """Judge the step's loss.

        Raises:
            LossSpike: on every rank, if it is one and there is a checkpoint to go back to.
            DivergedError: the run went back train.max_rollbacks times already.
        """
        state.consumed_samples = self.skipped_ranges.after(state.consumed_samples)
        if self.rule is None or not result.applied:
            return
        if self.begins_at(state.step):
            self.rule.losses.clear()  # more context, positions that were never trained, other texts
        loss = float(mean_over_data_parallel(result.loss.clone(), self.groups))
        limit = self.rule.limit()
        if not any_rank(loss > limit, self.groups):
            self.rule.accept(loss)
            return
        rollbacks = len(self.skipped_ranges.ranges)
        if rollbacks >= self.config.max_rollbacks:
            raise DivergedError(
                f"the loss {loss:.4f} of step {state.step} is above {limit:.4f} (mean + train.spike_sigma "
                f"{self.config.spike_sigma:g} deviations) after {rollbacks} rollbacks; lower optim.lr, "
                "or raise train.spike_sigma or train.max_rollbacks"
            )
        if self.can_go_back():
            raise LossSpike(state.step, loss, limit, state.consumed_samples)
        record = LossSpike(state.step, loss, limit, state.consumed_samples).record()
        self.hub.log("rollback", {"step": state.step, "path": None, **record})

    def state_dict(self) -> dict[str, Any]:
        """The window, so that a restart judges the same losses in the same way."""
        return {"losses": list(self.rule.losses)} if self.rule is not None and self.rule.losses else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; a checkpoint without a window (the rule was off) leaves it empty.

        Raises:
            CheckpointError: it is damaged.
        """
        if self.rule is not None:
            self.rule.losses.clear()
            losses = state.get("losses", [])
            if not isinstance(losses, list) or not all(type(loss) in (int, float) for loss in losses):
                raise CheckpointError("the checkpoint's state of 'spike' is damaged: its losses are no list of numbers")
            self.rule.losses.extend(map(float, losses))
