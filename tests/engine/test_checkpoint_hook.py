"""When a run saves, and what it does with what it loads. The files themselves: tests/checkpoint."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.engine import checkpoint_hook
from megatron_sgt.engine.checkpoint_hook import CheckpointHook
from megatron_sgt.engine.hooks import StatelessHook
from megatron_sgt.engine.state import TrainState
from megatron_sgt.engine.step import StepResult
from megatron_sgt.errors import CheckpointError
from megatron_sgt.metrics import MetricsHub
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config

GOOD = StepResult(torch.tensor(1.0), 1.0, True, 1e-3, 0.1)
SKIPPED = StepResult(torch.tensor(math.nan), math.inf, False, 1e-3, 0.1)


class Counter(StatelessHook):
    """A hook with a state."""

    name = "counter"

    def __init__(self) -> None:
        self.value = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


class Bench:
    """A hook whose saves end in a list."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interval: int = 0) -> None:
        self.saved: list[tuple[int, dict[str, Any]]] = []
        self.loaded: list[Path] = []

        def save(root: Path, step: int, state: dict[str, Any], *rest: Any) -> tuple[Path, int]:
            self.saved.append((step, state))
            return root / f"global_step{step}", 123

        monkeypatch.setattr(checkpoint_hook, "save_checkpoint", save)
        monkeypatch.setattr(
            checkpoint_hook, "load_checkpoint", lambda folder, *rest: self.loaded.append(folder)
        )
        config = small_config(checkpoint={"save_interval": interval, "save": "somewhere"})
        self.counter = Counter()
        engine: Any = SimpleNamespace(module=None)
        self.hook = CheckpointHook(config, engine, [self.counter], MetricsHub(), fake_groups())
        self.hook.before_run(TrainState())

    def steps(self) -> list[int]:
        return [step for step, _ in self.saved]


def test_it_saves_at_the_interval_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=3)
    for step in range(1, 8):
        bench.hook.after_step(TrainState(step), GOOD)
    bench.hook.after_run(TrainState(7))
    assert bench.steps() == [3, 6, 7]
    assert bench.hook.last_path == Path("somewhere/global_step7")


def test_the_end_on_an_interval_is_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, interval=3)
    for step in range(1, 7):
        bench.hook.after_step(TrainState(step), GOOD)
    bench.hook.after_run(TrainState(6))
    assert bench.steps() == [3, 6]


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


def test_a_loaded_checkpoint_is_not_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.hook.before_run(TrainState(5))
    bench.hook.after_run(TrainState(5))
    assert bench.steps() == []


def test_save_and_load_carry_counters_and_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch)
    bench.counter.value = 17
    bench.hook.after_run(TrainState(4, 32, 2, 0))
    [(_, saved)] = bench.saved
    other, state = Bench(monkeypatch), TrainState()
    other.hook.load(Path("there"), saved, state)
    assert state == TrainState(4, 32, 2, 0) and other.counter.value == 17
    assert other.loaded == [Path("there")]


def test_a_hook_without_saved_state_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = {"trainer": TrainState(4).state_dict(), "hooks": {}}
    with pytest.raises(CheckpointError, match="there holds no state of 'counter'"):
        Bench(monkeypatch).hook.load(Path("there"), saved, TrainState())
