"""Measures the time of a rank's own work on its device, without synchronizing anything."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """Adds up stretches of time per lap (an optimizer step).

    On a CPU stretches are host time. On a GPU they lie between two events on the current stream, so earlier queueing
    does not count; they are read when the laps are requested.
    """

    def __init__(self, device: torch.device) -> None:
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._laps: list[list[Any]] = []
        self._lap: list[Any] = []
        self._started: Any = None

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        """The stretch ends. Without a start (after an exception) nothing is added."""
        if self._started is not None:
            self._lap.append((self._started, self._now()))
            self._started = None

    def end_lap(self) -> None:
        self._laps.append(self._lap)
        self._lap = []

    def read(self) -> list[float]:
        laps, self._laps = self._laps, []
        if self._module is None:
            return [sum(end - start for start, end in lap) for lap in laps]
        for lap in laps[-1:]:
            for _, end in lap[-1:]:
                end.synchronize()
        return [sum(start.elapsed_time(end) for start, end in lap) / 1000.0 for lap in laps]

    def _now(self) -> Any:
        if self._module is None:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record()
        return event
