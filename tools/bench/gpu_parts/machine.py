"""The machine that is measured: its clock, its identity and its ceilings. A dry run has no clock."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sgt.metrics.throughput import peak_flops
from megatron_sgt.parallel.device import device_name

ROOT = Path(__file__).resolve().parents[3]


CLOCK_HERTZ = 2e9
"""No GPU of this kind ticks faster: ``torch.cuda._sleep`` counts ticks."""


@dataclass
class Machine:
    """``dry``: everything runs once, on a CPU, in tiny shapes, and no time is reported. ``deadline``: time.monotonic()
    after which sections skip what is left."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    deadline: float
    copy_bytes_per_second: float | None = None
    matmul_flops_per_second: float | None = None
    peak_flops_per_second: float | None = None

    def seconds(self, function: Callable[[], Any], repeats: int = 5, calls: int = 10) -> float | None:
        """Seconds of one call on the GPU: the median over ``repeats`` batches of ``calls``. None in a dry run.

        The GPU waits until a batch is in its queue, so that what is measured is not how fast Python launches it.
        """
        function()
        if self.dry:
            return None
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            function()
        launching = time.perf_counter() - began
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(2 * launching * CLOCK_HERTZ))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / calls)
        return statistics.median(times)

    def ideal_seconds(self, flops: float, bytes_moved: float) -> float | None:
        """The roofline: the least that so much arithmetic and so many bytes take; None before it is measured."""
        if not self.matmul_flops_per_second or not self.copy_bytes_per_second:
            return None
        return max(flops / self.matmul_flops_per_second, bytes_moved / self.copy_bytes_per_second)

    @property
    def late(self) -> bool:
        """Whether the time for the whole suite is used up."""
        return time.monotonic() > self.deadline

    def free(self) -> None:
        """Give unused device memory back."""
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def measure_ceilings(machine: Machine) -> dict[str, Any]:
    """What a copy and a square matrix product reach here: the roofline that kernels are held against."""
    elements, width = (2**8, 32) if machine.dry else (2**28, 8192)
    source = torch.randn(elements, device=machine.device).to(machine.dtype)
    target = torch.empty_like(source)
    copy = machine.seconds(lambda: target.copy_(source))
    a = torch.randn(width, width, device=machine.device).to(machine.dtype)
    product = machine.seconds(lambda: a @ a)
    if copy and product:
        machine.copy_bytes_per_second = 2 * source.numel() * source.element_size() / copy
        machine.matmul_flops_per_second = 2 * width**3 / product
    if not machine.dry:
        machine.peak_flops_per_second = peak_flops(device_name(machine.device), "bf16")
    return {
        "copy_gb_per_second": per(1e-9, machine.copy_bytes_per_second),
        "matmul_tflops": per(1e-12, machine.matmul_flops_per_second),
        "datasheet_tflops": per(1e-12, machine.peak_flops_per_second),
    }


def per(factor: float, value: float | None) -> float | None:
    """``value`` in other units, or None."""
    return None if value is None else round(value * factor, 3)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def identity(machine: Machine) -> dict[str, Any]:
    """Device, versions and commit of a result."""
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "deepspeed", "megatron.core"):
        try:
            versions[name] = __import__(name, fromlist=["__version__"]).__version__
        except ImportError:
            versions[name] = None
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "device": device_name(machine.device),
        "dry_run": machine.dry,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "commit": commit or None,
        "versions": versions,
    }
