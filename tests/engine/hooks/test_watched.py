"""What the loop calls is marked; what the hooks see and return is as without the marks."""

from __future__ import annotations

from typing import Any

import torch

from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.hooks.watched import watch_passes, watched_batches, watched_hooks
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.guard import Progress


class Noting(Hook):
    name = "eval"

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seen: list[Any] = []

    def _note(self, *what: Any) -> None:
        self.seen.append((*what, self.progress.mark.place, self.progress.mark.quick))

    def before_run(self, state: TrainState) -> None:
        self._note("before")

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self._note("step", result.applied)

    def after_stage(self, state: TrainState) -> None:
        self._note("stage")

    def after_run(self, state: TrainState) -> None:
        self._note("after")

    def on_stop(self, state: TrainState, reason: int) -> None:
        self._note("stop", reason)

    def on_save_now(self, state: TrainState) -> None:
        self._note("save now")

    def state_dict(self) -> dict[str, Any]:
        return {"kept": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._note(state)


def test_calls_are_phases() -> None:
    progress = Progress()
    inner = Noting(progress)
    (hook,) = watched_hooks([inner], progress)
    state = TrainState(step=3)
    hook.before_run(state)
    assert (progress.mark.place, progress.mark.quick) == ("step 4 (train)", False), "the first step may take longer"
    state.step = 4
    hook.after_step(state, StepResult(torch.tensor(1.0), 1.0, True, 0.1, 0.1))
    assert (progress.mark.place, progress.mark.quick) == ("step 5 (train)", True)
    hook.on_stop(state, 15)
    hook.on_save_now(state)
    hook.after_stage(state)
    hook.after_run(state)
    assert inner.seen == [
        ("before", "step 3 (eval)", False),
        ("step", True, "step 4 (eval)", False),
        ("stop", 15, "step 4 (eval)", False),
        ("save now", "step 4 (eval)", False),
        ("stage", "step 4 (eval)", False),
        ("after", "step 4 (eval)", False),
    ]
    assert (hook.name, hook.state_dict()) == ("eval", {"kept": 1})
    hook.load_state_dict({"kept": 2})
    assert inner.seen[-1][0] == {"kept": 2}


def test_waiting_for_data_is_a_phase() -> None:
    progress, during = Progress(), []

    def batches() -> Any:
        for number in range(2):
            during.append(progress.mark.phase)
            yield number

    progress.enter("train", 9)
    after = [(batch, progress.mark.place) for batch in watched_batches(batches(), progress)]
    assert during == ["data", "data"]
    assert after == [(0, "step 9 (train)"), (1, "step 9 (train)")]


def test_every_pass_of_training_is_a_mark() -> None:
    """In a pipeline, whose micro-batches are all fetched before: a long step is no hang."""
    progress, model = Progress(), torch.nn.Linear(2, 2)
    watch_passes(model, progress)
    progress.enter("data", 7)
    count = progress.mark.count
    for _ in range(3):
        model(torch.ones(2))
    assert (progress.mark.place, progress.mark.count - count) == ("step 7 (train)", 3)
    progress.enter("eval")
    model.eval()(torch.ones(2))
    assert progress.mark.place == "step 7 (eval)", "validation is a phase of its own"
