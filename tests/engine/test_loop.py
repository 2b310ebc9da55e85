"""The loop with a scripted step: what it counts, whom it calls, when it gives up."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.config import Config, DataConfig
from megatron_sgt.engine import loop
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.loop import DivergedError, Trainer
from megatron_sgt.engine.step import Batch, StepResult, TrainState
from megatron_sgt.guard.save_now import FILE, SaveTrigger
from megatron_sgt.guard.stop import Reason, StopRequests
from megatron_sgt.optim.schedule import learning_rate
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config

CONFIG = small_config(
    optim={"lr": 1e-3, "lr_warmup_iters": 2},
    train={
        "train_iters": 10,
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "max_consecutive_skipped_steps": 3,
    },
)
ACCUMULATION = 4


class Diary(Hook):
    """Writes down every call."""

    def __init__(self, name: str, calls: list[Any]) -> None:
        self.name = name
        self.calls = calls

    def before_run(self, state: TrainState) -> None:
        self.calls.append((self.name, "before", state.step))

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self.calls.append((self.name, "step", state.step, result.applied))

    def after_run(self, state: TrainState) -> None:
        self.calls.append((self.name, "after", state.step))

    def on_stop(self, state: TrainState, reason: int) -> None:
        self.calls.append((self.name, "stop", state.step, reason))

    def on_save_now(self, state: TrainState) -> None:
        self.calls.append((self.name, "save now", state.step))


class StopAfter(Hook):
    """Receives a signal in the middle of a step."""

    def __init__(self, stop: StopRequests, step: int) -> None:
        self.stop = stop
        self.step = step

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if state.step == self.step:
            self.stop.receive(signal.SIGTERM)


class Scripted:
    """train_step's stand-in: applies or skips by a script; notes the learning rates and batches it was given."""

    def __init__(self, applied: str) -> None:
        self.applied = iter(applied)
        self.pieces: list[int] = []
        self.rates: list[float] = []
        self.seen: list[int] = []

    def __call__(
        self, engine: Any, batches: Iterator[Batch], lr: float, clip_grad: float, groups: Any, pieces: int
    ) -> StepResult:
        taken = [int(batch["tokens"]) for batch in batches]
        assert len(taken) == ACCUMULATION and clip_grad == CONFIG.optim.clip_grad
        self.rates.append(lr)
        self.seen += taken
        self.pieces.append(pieces)
        good = next(self.applied) == "+"
        return StepResult(torch.tensor(1.0 if good else math.nan), 1.0 if good else math.inf, good, lr, 0.1)


def numbered() -> Iterator[Batch]:
    return ({"tokens": torch.tensor(n)} for n in range(10_000))


def trainer(engine: Any, state: TrainState, hooks: list[Diary], config: Config = CONFIG) -> Trainer:
    return Trainer(config, fake_groups(), engine, state, hooks, StopRequests(config.train))


def train(
    monkeypatch: pytest.MonkeyPatch, applied: str, last_step: int, state: TrainState, config: Config = CONFIG
) -> tuple[Scripted, list[Any]]:
    scripted, calls = Scripted(applied), []
    monkeypatch.setattr(loop, "train_step", scripted)
    modes: list[str] = []
    engine: Any = SimpleNamespace(train=lambda: modes.append("train"), gradient_accumulation_steps=lambda: ACCUMULATION)
    hooks = [Diary("first", calls), Diary("second", calls)]
    trainer(engine, state, hooks, config).run(numbered(), last_step)
    assert modes == ["train"]
    return scripted, calls


def test_hooks_act_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    _, calls = train(monkeypatch, "++", 2, TrainState())
    names = ("first", "second")
    assert calls == [
        *((name, "before", 0) for name in names),
        *((name, "step", 1, True) for name in names),
        *((name, "step", 2, True) for name in names),
        *((name, "after", 2) for name in names),
    ]


def test_a_request_stops_before_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_step", Scripted("+++"))
    calls: list[Any] = []
    engine: Any = SimpleNamespace(train=lambda: None, gradient_accumulation_steps=lambda: ACCUMULATION)
    run = trainer(engine, TrainState(), [Diary("d", calls)])
    agreed: list[int] = []
    run.stop.on_agreed = agreed.append
    run.hooks = [*run.hooks, StopAfter(run.stop, 2)]
    assert run.run(numbered(), 9) == Reason.SIGTERM
    assert calls[-1] == ("d", "stop", 2, Reason.SIGTERM) and agreed == [Reason.SIGTERM]
    assert not [call for call in calls if call[1] == "after"], "after_run would validate first"


class AskAfter(Hook):
    """Somebody asks for a checkpoint in the middle of a step."""

    def __init__(self, trigger: Path, step: int) -> None:
        self.trigger = trigger
        self.step = step

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if state.step == self.step:
            self.trigger.touch()


def test_a_request_to_save_stops_nothing_and_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop, "train_step", Scripted("++-+"))
    calls: list[Any] = []
    engine: Any = SimpleNamespace(train=lambda: None, gradient_accumulation_steps=lambda: ACCUMULATION)
    run = trainer(engine, TrainState(), [Diary("d", calls)])
    agreed: list[int] = []
    run.stop.on_agreed = agreed.append  # starts the time after which an exit is forced
    run.stop.trigger = SaveTrigger(tmp_path)
    run.hooks = [*run.hooks, AskAfter(tmp_path / FILE, 1)]
    assert run.run(numbered(), 3) == 0
    assert [call[1:] for call in calls if call[1] == "save now"] == [("save now", 1)] and agreed == []
    assert calls[-1] == ("d", "after", 3) and not (tmp_path / FILE).exists()


def test_a_run_that_stops_takes_a_request_to_save_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop, "train_step", Scripted("++"))
    calls: list[Any] = []
    engine: Any = SimpleNamespace(train=lambda: None, gradient_accumulation_steps=lambda: ACCUMULATION)
    run = trainer(engine, TrainState(), [Diary("d", calls)])
    run.stop.trigger = SaveTrigger(tmp_path)
    run.hooks = [*run.hooks, StopAfter(run.stop, 1), AskAfter(tmp_path / FILE, 1)]
    assert run.run(numbered(), 3) == Reason.SIGTERM and calls[-1] == ("d", "stop", 1, Reason.SIGTERM)
    assert not (tmp_path / FILE).exists(), "the stop saves"


def test_a_request_in_the_last_step_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "train_step", Scripted("++"))
    calls: list[Any] = []
    engine: Any = SimpleNamespace(train=lambda: None, gradient_accumulation_steps=lambda: ACCUMULATION)
    run = trainer(engine, TrainState(), [Diary("d", calls)])
    run.hooks = [*run.hooks, StopAfter(run.stop, 2)]
    assert run.run(numbered(), 2) == 0 and calls[-1] == ("d", "after", 2)


def test_counters_rates_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState(step=3, consumed_samples=24)
    scripted, _ = train(monkeypatch, "++", 5, state)
    assert state == TrainState(step=5, consumed_samples=40)
    assert scripted.rates == [learning_rate(step, CONFIG.optim, 10) for step in (4, 5)]
    assert scripted.seen == list(range(2 * ACCUMULATION))


def test_a_skipped_step_is_no_step_but_its_data_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainState()
    scripted, calls = train(monkeypatch, "+--+-+", 3, state)
    assert state == TrainState(step=3, consumed_samples=48, skipped_steps=3, consecutive_skipped=0)
    assert [call[2:] for call in calls if call[:2] == ("first", "step")] == [
        (1, True), (1, False), (1, False), (2, True), (2, False), (3, True),
    ]  # fmt: skip
    # The rate of a step is tried again, on the data that follows.
    assert scripted.rates == [learning_rate(step, CONFIG.optim, 10) for step in (1, 2, 2, 2, 3, 3)]
    assert scripted.seen == list(range(6 * ACCUMULATION))


def test_applied_steps_decide_on_the_length_also_after_going_back(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [{"until_steps": 2, "seq_length": 4}, {"until_steps": 4, "seq_length": 8}]
    data = DataConfig.model_validate({"seq_length_curriculum": entries})
    state, config = TrainState(), CONFIG.model_copy(update={"data": data})
    scripted, _ = train(monkeypatch, "+-+++-++", 6, state, config)
    assert scripted.pieces == [8, 8, 8, 4, 4, 1, 1, 1]
    state.load_state_dict({**state.state_dict(), "step": 3})
    scripted, _ = train(monkeypatch, "++", 5, state, config)
    assert scripted.pieces == [4, 1]


def test_too_many_skipped_steps_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    state, calls = TrainState(), []
    monkeypatch.setattr(loop, "train_step", Scripted("++---+"))
    engine: Any = SimpleNamespace(train=lambda: None, gradient_accumulation_steps=lambda: ACCUMULATION)
    with pytest.raises(DivergedError, match=r"3 steps in a row after step 2 .* \(last loss nan\)") as caught:
        trainer(engine, state, [Diary("d", calls)]).run(numbered(), 9)
    assert caught.value.exit_code == 1
    assert state.consecutive_skipped == 3
    assert [call for call in calls if call[1] == "after"] == [], "after_run would save the diverged state"


def test_the_message_shows_a_finite_loss_as_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def infinite_gradient(*args: Any) -> StepResult:
        list(args[1])
        return StepResult(torch.tensor(2.34567), math.inf, False, 1e-3, 0.1)

    monkeypatch.setattr(loop, "train_step", infinite_gradient)
    engine: Any = SimpleNamespace(train=lambda: None, gradient_accumulation_steps=lambda: ACCUMULATION)
    with pytest.raises(DivergedError, match=r"last loss 2\.3457"):
        trainer(engine, TrainState(), []).run(numbered(), 9)


class Clock:
    """Time passes as the parts of a step say; it stands for the module ``time``."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


class Takes(Hook):
    """Takes ``seconds`` after every step; notes what each step was said to have taken."""

    def __init__(self, clock: Clock, seconds: float, pauses: bool) -> None:
        self.clock, self.seconds, self.pauses = clock, seconds, pauses
        self.reported: list[float] = []

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self.clock.now += self.seconds
        self.reported.append(result.seconds)


def test_a_step_lasts_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host waits for between two steps is the device's work on them; validation and saving are not."""
    clock = Clock()
    scripted = Scripted("+++")

    def step(*arguments: Any) -> StepResult:
        clock.now += 2.0
        return scripted(*arguments)

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(loop, "train_step", step)
    log, validation = Takes(clock, 0.5, pauses=False), Takes(clock, 30.0, pauses=True)
    run = trainer(
        SimpleNamespace(train=lambda: None, gradient_accumulation_steps=lambda: ACCUMULATION), TrainState(), []
    )
    run.hooks = [log, validation]
    monkeypatch.setattr(run.stop, "pending", lambda: setattr(clock, "now", clock.now + 0.25) or 0)
    run.run(numbered(), 3)
    assert log.reported == validation.reported == pytest.approx([2.25, 2.75, 2.75])


def test_who_pauses_training() -> None:
    from megatron_sgt.engine.hooks.checkpoint import CheckpointHook
    from megatron_sgt.engine.hooks.growth import GrowthHook
    from megatron_sgt.engine.hooks.log import LogHook
    from megatron_sgt.engine.hooks.validation import EvalHook
    from megatron_sgt.engine.hooks.watched import watched_hooks
    from megatron_sgt.guard import Progress

    assert EvalHook.pauses and CheckpointHook.pauses and not GrowthHook.pauses and not LogHook.pauses
    hooks = [Takes(Clock(), 0.0, pauses=value) for value in (True, False)]
    assert [hook.pauses for hook in watched_hooks(hooks, Progress())] == [True, False]
