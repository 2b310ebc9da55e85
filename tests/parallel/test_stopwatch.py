"""Stretches of time by lap, on a CPU and with the events of a device."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.parallel.stopwatch import Stopwatch


def test_stretches_add_up_by_lap(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 24.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    for stretches in (2, 1, 0):
        for _ in range(stretches):
            watch.start()
            watch.stop()
        watch.end_lap()
    watch.stop()  # without a beginning
    assert watch.read() == [3.0, 4.0, 0.0]
    assert watch.read() == []


def test_on_a_device_nothing_waits_before_the_laps_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []

    class Event:
        made = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            Event.made += 1
            self.at = Event.made * 10.0

        def record(self) -> None:
            pass

        def synchronize(self) -> None:
            waits.append(int(self.at))

        def elapsed_time(self, other: Any) -> float:
            return other.at - self.at

    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(Event=Event))
    watch = Stopwatch(torch.device("meta"))
    for _ in range(2):
        watch.start()
        watch.stop()
        watch.end_lap()
    assert waits == []
    assert watch.read() == [0.01, 0.01]
    assert waits == [40], "one wait, for the last event"
