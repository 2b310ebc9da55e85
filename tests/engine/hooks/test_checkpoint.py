"""When a run saves, and what it does with what it loads. The files themselves: tests/checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.save import Saved
from megatron_sgt.engine.hooks import checkpoint as checkpoint_hook
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.hooks.checkpoint import CheckpointHook
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError, SGTError
from megatron_sgt.metrics import MetricsHub
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config

GOOD = StepResult(torch.tensor(1.0), 1.0, True, 1e-3, 0.1)
SKIPPED = StepResult(torch.tensor(math.nan), math.inf, False, 1e-3, 0.1)


class Counter(Hook):
    """A hook with a state."""

    name = "counter"

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class FakeSaver:
    """Saves into a list; ``fails``: these steps cannot be written; ``lasts``: polls until a save is whole."""

    def __init__(self) -> None:
        self.saved: list[tuple[int, dict[str, Any]]] = []
        self.fails: set[int] = set()
        self.lasts = 0
        self.prepared = 0
        self._flight: tuple[int, dict[str, Any]] | None = None
        self._left = 0

    def prepare(self) -> None:
        self.prepared += 1

    def start(self, step: int, state: dict[str, Any]) -> None:
        assert self._flight is None
        self._flight, self._left = (step, state), self.lasts

    def poll(self, wait: bool = False) -> Saved | None:
        if self._flight is None:
            return None
        self._left -= 1
        if self._left >= 0 and not wait:
            return None
        (step, state), self._flight = self._flight, None
        if step in self.fails:
            raise CheckpointError("no space left")
        self.saved.append((step, state))
        return Saved(step, Path(f"somewhere/global_step{step}"), 123, 0.1, 1.0)


class Bench:
    """A hook whose saves end in a list, and what it reports."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, interval: int = 0, async_save: bool = False, own: bool = False
    ) -> None:
        self.loaded: list[Path] = []
        self.saver = FakeSaver()
        monkeypatch.setattr(checkpoint_hook, "Saver", lambda *_: self.saver)
        monkeypatch.setattr(Path, "exists", lambda path: True)  # nothing is written, and nothing is deleted
        monkeypatch.setattr(checkpoint_hook, "load_checkpoint", lambda folder, *rest: self.loaded.append(folder))
        config = small_config(checkpoint={"save_interval": interval, "save": "somewhere", "async_save": async_save})
        self.counter = Counter()
        engine: Any = SimpleNamespace(module=None)
        hub, at_first = MetricsHub([self]), {"counter": {"value": 0}} if own else {}
        self.hook = CheckpointHook(config, engine, [self.counter], hub, fake_groups(), at_first=at_first)
        self.reports: list[tuple[str, int]] = []
        self.asked: list[int] = []
        self.hook.before_run(TrainState())

    def steps(self) -> list[int]:
        return [step for step, _ in self.saver.saved]

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        self.reports.append((kind, record["step"]))
        self.asked += [record["step"]] if record.get("asked") else []

    def advance(self, step: int) -> None:
        """See Writer."""

    def close(self) -> None:
        """See Writer."""


def test_it_saves_at_the_interval_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=3)
    for step in range(1, 8):
        bench.hook.after_step(TrainState(step), GOOD)
    bench.hook.after_run(TrainState(7))
    assert bench.steps() == [3, 6, 7]
    assert bench.hook.last_path == Path("somewhere/global_step7")


def test_a_state_that_json_cannot_hold_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any rank begins: rank 0 alone writes the states, and the others would wait for it."""
    bench = Bench(monkeypatch, interval=1)
    bench.counter.value = torch.tensor(1.0)  # type: ignore[assignment]
    with pytest.raises(SGTError, match=r"the state of hook 'counter' is not JSON-able: .*Tensor"):
        bench.hook.after_step(TrainState(1), GOOD)  # not for hours without a checkpoint
    assert not bench.reports and bench.saver._flight is None
    bench.counter.value = [1]  # type: ignore[assignment]
    monkeypatch.setattr(bench.counter, "state_dict", lambda: [1])
    with pytest.raises(SGTError, match="the state of hook 'counter' is a list, not a dict"):
        bench.hook.after_run(TrainState(1))


def test_the_end_on_an_interval_is_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=3)
    for step in range(1, 7):
        bench.hook.after_step(TrainState(step), GOOD)
    bench.hook.after_run(TrainState(6))
    assert bench.steps() == [3, 6]


def test_the_end_of_a_stage_is_saved_with_what_the_hooks_then_do(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=2)
    bench.hook.stage_end = 4
    for step in range(1, 5):
        bench.hook.after_step(TrainState(step), GOOD)
    bench.counter.value = 17
    bench.hook.after_stage(TrainState(4))
    bench.hook.after_run(TrainState(4))  # of a run that ends there
    assert bench.steps() == [2, 4] and bench.saver.saved[-1][1]["hooks"]["counter"] == {"value": 17}


def test_without_an_interval_only_the_end_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    for step in range(1, 5):
        bench.hook.after_step(TrainState(step), GOOD)
    assert bench.steps() == []
    bench.hook.after_run(TrainState(4))
    assert bench.steps() == [4]


def test_nothing_is_saved_in_the_middle_of_a_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=1)
    bench.hook.after_step(TrainState(1), GOOD)
    for skipped in (1, 2):
        bench.hook.after_step(TrainState(1, consecutive_skipped=skipped), SKIPPED)
    bench.hook.after_run(TrainState(1, consecutive_skipped=2))
    assert bench.steps() == [1]
    bench.hook.after_step(TrainState(2, skipped_steps=2), GOOD)
    assert bench.steps() == [1, 2]


def test_a_save_that_fails_is_reported_and_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=2)
    bench.saver.fails = {2, 4}
    for step in range(1, 7):
        bench.hook.after_step(TrainState(step), GOOD)
    assert bench.reports == [("save_failed", 2), ("save_failed", 4), ("save", 6)]
    bench.saver.fails = {7}
    with pytest.raises(CheckpointError, match="no space left"):
        bench.hook.after_run(TrainState(7))


def test_the_end_saves_what_an_interval_could_not(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=2)
    bench.saver.fails = {2}
    bench.hook.after_step(TrainState(2), GOOD)
    bench.saver.fails = set()
    bench.hook.after_run(TrainState(2))
    assert bench.reports == [("save_failed", 2), ("save", 2)]


def test_an_asynchronous_save_is_whole_some_steps_later(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=4, async_save=True)
    assert bench.saver.prepared == 1
    bench.saver.lasts = 3
    seen = []
    for step in range(1, 10):
        bench.hook.after_step(TrainState(step), GOOD)
        seen.append(len(bench.steps()))
    assert seen == [0, 0, 0, 0, 0, 0, 1, 1, 1]
    bench.hook.after_run(TrainState(9))
    assert bench.steps() == [4, 8, 9], "the end waits for the save in flight"


def test_a_run_that_diverges_keeps_the_save_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=1, async_save=True)
    bench.saver.lasts = 99
    bench.hook.after_step(TrainState(1), GOOD)
    bench.hook.settle(TrainState(1, consecutive_skipped=3))
    assert bench.steps() == [1]


def test_a_second_save_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=1, async_save=True)
    bench.saver.lasts = 99
    for step in (1, 2):
        bench.hook.after_step(TrainState(step), GOOD)
    assert bench.steps() == [1] and bench.saver.poll(wait=True) is not None


def test_a_request_to_stop_saves_unless_nothing_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.hook.on_stop(TrainState(0), 15)
    assert bench.steps() == []
    bench.hook.on_stop(TrainState(3), 15)
    assert bench.steps() == [3]


@pytest.mark.parametrize("interval", [0, 3])
def test_a_save_that_was_asked_for_follows_the_next_applied_step(
    interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(monkeypatch, interval)
    bench.hook.after_step(TrainState(1), GOOD)
    bench.hook.on_save_now(TrainState(1))
    bench.hook.after_step(TrainState(1, consecutive_skipped=1), SKIPPED)
    for step in (2, 3, 4):
        bench.hook.after_step(TrainState(step), GOOD)
    assert bench.asked == [2] and bench.steps() == ([2, 3] if interval else [2])
    bench.saver.fails = {5}
    bench.hook.on_save_now(TrainState(4))
    bench.hook.after_step(TrainState(5), GOOD)
    assert bench.reports[-1] == ("save_failed", 5)
    bench.hook.after_step(TrainState(7), GOOD)
    assert bench.reports[-1] == ("save_failed", 5), "a full disk is not met after every step"


def test_a_loaded_checkpoint_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.hook.before_run(TrainState(5))
    bench.hook.after_run(TrainState(5))
    assert bench.steps() == []


def test_save_and_load_carry_counters_and_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.counter.value = 17
    bench.hook.after_run(TrainState(4, 32, 2, 0))
    [(_, saved)] = bench.saver.saved
    other, state = Bench(monkeypatch), TrainState()
    other.hook.load(Path("there"), saved, state)
    assert state == TrainState(4, 32, 2, 0) and other.counter.value == 17
    assert other.loaded == [Path("there")]


def test_a_hook_without_saved_state_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"trainer": TrainState(4).state_dict(), "hooks": {}}
    with pytest.raises(CheckpointError, match="there holds no state of 'counter'"):
        Bench(monkeypatch).hook.load(Path("there"), saved, TrainState())


def test_a_user_s_hook_is_saved_and_loaded_like_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, own=True)
    bench.counter.value = 17
    bench.hook.after_run(TrainState(4))
    [(_, saved)] = bench.saver.saved
    other = Bench(monkeypatch, own=True)
    other.hook.load(Path("there"), saved, TrainState())
    assert other.counter.value == 17


def test_a_user_s_hook_without_saved_state_starts_with_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a rollback, too: what it has counted since is undone."""
    bench = Bench(monkeypatch, own=True)
    bench.counter.value = 17
    bench.hook.load(Path("there"), {"trainer": TrainState(4).state_dict(), "hooks": {}}, TrainState())
    assert bench.counter.value == 0
    assert capsys.readouterr().out == ("HOOKS  the checkpoint holds no state of 'counter': it starts with this run\n")


def test_the_state_of_a_hook_that_the_run_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Bench(monkeypatch)
    hooks = {"counter": {"value": 3}, "other": {"value": 5}}
    bench.hook.load(Path("there"), {"trainer": TrainState(4).state_dict(), "hooks": hooks}, TrainState())
    assert bench.counter.value == 3
    assert capsys.readouterr().out == (
        "HOOKS  the checkpoint holds the state of 'other', which this run does not have: it is dropped\n"
    )
