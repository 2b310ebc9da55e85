"""The machine that is measured: its clock, its identity and its ceilings.

A dry run measures as any other, with the host's clock, so that it executes what a GPU will; ``without_figures`` then
leaves nothing of it that could be taken for a measurement.
"""

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
from megatron_sgt.parallel.device import device_name, synchronize

ROOT = Path(__file__).resolve().parents[3]


CLOCK_HERTZ = 2e9
"""No GPU of this kind ticks faster: ``torch.cuda._sleep`` counts ticks."""


@dataclass
class Machine:
    """``dry``: on a CPU, in tiny shapes, each call once. ``deadline``: time.monotonic() after which sections skip what
    is left. The ceilings are set by ``measure_ceilings``; the peak of a device without a data sheet is None."""

    device: torch.device
    dtype: torch.dtype
    dry: bool
    deadline: float
    copy_bytes_per_second: float = 1.0
    matmul_flops_per_second: float = 1.0
    peak_flops_per_second: float | None = None

    def seconds(self, function: Callable[[], Any], repeats: int = 5, calls: int = 10) -> float:
        """Seconds of one call on the device: the median over ``repeats`` batches of ``calls``."""
        function()
        if self.dry:
            repeats = calls = 1
        synchronize(self.device)
        launching = _host_seconds(function, calls)
        if self.device.type == "cuda":
            batches = [_gpu_seconds(function, calls, launching) for _ in range(repeats)]
        else:
            batches = [_host_seconds(function, calls) for _ in range(repeats)]
        return statistics.median(batches) / calls

    def ideal_seconds(self, flops: float, bytes_moved: float) -> float:
        """The roofline: the least that so much arithmetic and so many bytes take."""
        return max(flops / self.matmul_flops_per_second, bytes_moved / self.copy_bytes_per_second)

    @property
    def late(self) -> bool:
        """Whether the time for the whole suite is used up."""
        return time.monotonic() > self.deadline

    def free(self) -> None:
        """Give unused device memory back."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _host_seconds(function: Callable[[], Any], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return time.perf_counter() - began


def _gpu_seconds(function: Callable[[], Any], calls: int, launching: float) -> float:
    """The GPU waits until the batch, which takes ``launching`` seconds to launch, is in its queue: what is measured
    is not how fast Python launches it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2 * launching * CLOCK_HERTZ))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def measure_ceilings(machine: Machine) -> dict[str, Any]:
    """What a copy and a square matrix product reach here: the roofline that kernels are held against."""
    elements, width = (2**8, 32) if machine.dry else (2**28, 8192)
    source = torch.randn(elements, device=machine.device).to(machine.dtype)
    target = torch.empty_like(source)
    copy = machine.seconds(lambda: target.copy_(source))
    a = torch.randn(width, width, device=machine.device).to(machine.dtype)
    product = machine.seconds(lambda: a @ a)
    machine.copy_bytes_per_second = 2 * source.numel() * source.element_size() / copy
    machine.matmul_flops_per_second = 2 * width**3 / product
    machine.peak_flops_per_second = peak_flops(device_name(machine.device), "bf16")
    return {
        "copy_gb_per_second": per(1e-9, machine.copy_bytes_per_second),
        "matmul_tflops": per(1e-12, machine.matmul_flops_per_second),
        "datasheet_tflops": per(1e-12, machine.peak_flops_per_second),
    }


def per(factor: float, value: float | None) -> float | None:
    """``value`` in other units, or None."""
    return None if value is None else round(value * factor, 3)


DRY_FIGURE = "dry"


def without_figures(value: Any) -> Any:
    """A copy of a result in which every figure that was measured (a float) is the word "dry", and no target is met."""
    if isinstance(value, dict):
        return {name: None if name == "met" else without_figures(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_figures(inner) for inner in value]
    return DRY_FIGURE if isinstance(value, float) else value


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
