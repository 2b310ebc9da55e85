"""The machine that is measured: its clock, its identity and its ceilings.

A dry run measures as any other, with the host's clock, so that it executes what a GPU will; ``without_figures`` then
leaves nothing of it that could be taken for a measurement.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sgt.metrics.throughput import peak_flops
from megatron_sgt.parallel.device import device_name, synchronize

ROOT = Path(__file__).resolve().parents[3]

CLOCK_HERTZ = 2e9
"""No GPU of this kind ticks faster: ``torch.cuda._sleep`` counts ticks."""
CACHE_TIMES = 3
"""Buffers that are used in turn hold so many times what the level-2 cache holds, so that none is found there."""
MOST_COPIES = 24
LOADED_SECONDS = 0.6
"""The device is kept busy so long while its clocks are read."""

Call = Callable[[], Any]


@dataclass
class Machine:
    """Where and how a row is measured.

    ``dry``: on a CPU, in tiny shapes, each call once. ``warm``: kernels are compiled and nothing is measured.
    ``deadline``: time.monotonic() at which the row is killed. ``backend``, ``attention``: what may be used of the
    loop's kernels (train.loop_backend, train.loop_attention). The ceilings come with every row.
    """

    device: torch.device
    dtype: torch.dtype
    dry: bool
    deadline: float = math.inf
    warm: bool = False
    backend: str = "triton"
    attention: str = "auto"
    copy_bytes_per_second: float = 1.0
    matmul_flops_per_second: float = 1.0

    @classmethod
    def make(cls, dry: bool, warm: bool = False) -> Machine:
        """The GPU in bf16, or the CPU in fp32: Triton's interpreter has no bf16."""
        device = torch.device("cpu" if dry else "cuda")
        return cls(device, torch.float32 if dry else torch.bfloat16, dry, warm=warm)

    def restore(self, state: dict[str, Any], deadline: float) -> None:
        """Take over what other rows have found: the ceilings, and the kernels that can be trusted."""
        self.deadline, self.backend, self.attention = deadline, state["backend"], state["attention"]
        for ceilings in state["ceilings"]:
            self.copy_bytes_per_second = 1e9 * ceilings["copy_gb_per_second"]
            self.matmul_flops_per_second = 1e12 * ceilings["matmul_tflops"]

    @property
    def peak_flops_per_second(self) -> float | None:
        """Of the data sheet, in bf16."""
        return peak_flops(device_name(self.device), "bf16")

    def seconds(self, functions: Call | Sequence[Call], repeats: int = 5, calls: int = 10) -> float:
        """Seconds of one call on the device: the median over ``repeats`` batches of ``calls``.

        Several functions, which do the same on buffers of their own, are called in turn: see ``copies``.
        """
        functions = [functions] if callable(functions) else list(functions)
        for function in functions[:1] if self.warm else functions:
            function()
        if self.warm:
            return 1.0
        if self.dry:
            repeats = calls = 1
        synchronize(self.device)
        turns = itertools.cycle(functions)
        launching = _host_seconds(turns, calls)
        if self.device.type == "cuda":
            batches = [_gpu_seconds(turns, calls, launching) for _ in range(repeats)]
        else:
            batches = [_host_seconds(turns, calls) for _ in range(repeats)]
        return statistics.median(batches) / calls

    def copies(self, size: float) -> int:
        """Buffers of ``size`` bytes to be used in turn, so that none of them is read from the level-2 cache."""
        if self.dry or self.warm:
            return 1 if self.warm else 2
        cache = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 * 2**20
        return min(MOST_COPIES, 1 + math.ceil(CACHE_TIMES * cache / size))

    def ideal_seconds(self, flops: float, bytes_moved: float) -> float:
        """The roofline: the least that so much arithmetic and so many bytes take."""
        return max(flops / self.matmul_flops_per_second, bytes_moved / self.copy_bytes_per_second)

    def free(self, quietly: bool = False) -> None:
        """Give unused device memory back; ``quietly``: unless the device no longer answers."""
        if self.device.type == "cuda" and torch.cuda.is_available() and not quietly:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def _host_seconds(turns: Iterator[Call], calls: int) -> float:
    began = time.perf_counter()
    for function in itertools.islice(turns, calls):
        function()
    return time.perf_counter() - began


def _gpu_seconds(turns: Iterator[Call], calls: int, launching: float) -> float:
    """Times the batch, not its launch: the GPU waits ``launching`` seconds, until all of it is in its queue."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int(2 * launching * CLOCK_HERTZ))
    start.record()
    for function in itertools.islice(turns, calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ceilings(machine: Machine, when: str) -> Iterator[dict[str, Any]]:
    """What a copy and a square matrix product reach here: the roofline that kernels are held against.

    With the device's clocks and power before, under load and after: another ceiling at the end of the suite, at
    other clocks, says how far times of different rows can be compared.
    """
    before = clocks("before")
    elements, width = (2**8, 32) if machine.dry else (2**28, 8192)
    source = torch.randn(elements, device=machine.device).to(machine.dtype)
    target = torch.empty_like(source)
    copy = machine.seconds(lambda: target.copy_(source))
    a = torch.randn(width, width, device=machine.device).to(machine.dtype)
    product = machine.seconds(lambda: a @ a)
    for _ in range(1 if machine.dry else math.ceil(LOADED_SECONDS / product)):
        a @ a
    loaded = clocks("loaded")
    synchronize(machine.device)
    yield {
        "when": when,
        "copy_gb_per_second": per(1e-9, 2 * source.numel() * source.element_size() / copy),
        "matmul_tflops": per(1e-12, 2 * width**3 / product),
        "datasheet_tflops": per(1e-12, machine.peak_flops_per_second),
        **before,
        **loaded,
        **clocks("after"),
    }


def clocks(when: str) -> dict[str, float | None]:
    """MHz of the multiprocessors, watts and °C of the first GPU now; None where nvidia-smi is not there."""
    fields = {"clocks.sm": "sm_mhz", "power.draw": "watts", "temperature.gpu": "celsius"}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    values = [_number(text) for text in output_of(command).partition("\n")[0].split(",")]
    values += [None] * (len(fields) - len(values))
    return {f"{name}_{when}": value for name, value in zip(fields.values(), values, strict=False)}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def output_of(command: list[str]) -> str:
    """What a program prints; nothing where it is absent, fails or hangs."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=False
        )
        return done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def per(factor: float, value: float | None) -> float | None:
    """``value`` in other units, or None."""
    return None if value is None else round(value * factor, 3)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def identity(machine: Machine) -> Iterator[dict[str, Any]]:
    """Device (None: no GPU), versions, commit and sources of a result."""
    if not machine.dry and not torch.cuda.is_available():
        yield {"device": None}
        return
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "deepspeed", "megatron.core"):
        try:
            versions[name] = __import__(name, fromlist=["__version__"]).__version__
        except ImportError:
            versions[name] = None
    yield {
        "device": device_name(machine.device),
        "dry_run": machine.dry,
        "dtype": str(machine.dtype).removeprefix("torch."),
        "commit": output_of(["git", "describe", "--always", "--dirty"]) or None,
        "sources": sources(),
        "versions": versions,
    }


def sources(root: Path = ROOT) -> str:
    """A hash of the package and the suite: which state was measured, where there is no git to say it."""
    files = sorted(p for folder in ("megatron_sgt", "tools/bench") for p in (root / folder).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
