"""Whole training steps: vanilla and grown structures in alternation, under DeepSpeed ZeRO-1 on one device."""

from __future__ import annotations

import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gpu_parts.machine import Machine, first_line, per
from gpu_parts.targets import ENTROPIES
from megatron_sgt.config import Config
from megatron_sgt.engine.build import Runtime, build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.environment import discover
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.parallel.device import memory_gb, synchronize
from megatron_sgt.planning.flops import step_flops

Step = Callable[[LoopPlan, bool], float]
"""(structure, whether entropies are measured) -> seconds of one step."""
Rows = Callable[..., Iterator[dict[str, Any]]]
# layers, hidden, ffn, heads, sequences per step
MODELS = {"300M": (24, 1024, 2752, 16, 4), "1.2B": (24, 2048, 5504, 16, 2)}
TINY = (2, 64, 64, 2, 1)
"""In place of every model in a dry run."""
KERNELS_SHOWN = 25


def run_config(
    machine: Machine, layers: int, hidden: int, ffn: int, heads: int, batch: int, fusions: str = "auto"
) -> Config:
    """A run of T = 4096 without data."""
    return Config.model_validate(
        {
            "model": {
                "num_layers": layers,
                "hidden_size": hidden,
                "ffn_hidden_size": ffn,
                "num_attention_heads": heads,
                "seq_length": 32 if machine.dry else 4096,
                "vocab_size": 128 if machine.dry else 32000,
            },
            "growth": {"num_keep_heads": 2, "max_loop_depth": 3, "top_k_layers": 1, "max_selected_layers": 1},
            "optim": {"lr": 1e-4},
            "train": {
                "train_iters": 1,
                "micro_batch_size": batch,
                "global_batch_size": batch,
                "precision": "fp32" if machine.dry else "bf16",
                # By name: the interpreter is never chosen by itself.
                "loop_backend": machine.backend,
                "loop_attention": machine.attention,
                "fusions": fusions,
            },
            "parallel": {"device": machine.device.type, "zero_stage": 1},
        }
    )


def structures(layers: int, heads: int) -> dict[str, LoopPlan]:
    """What is held against vanilla: the deepest layers loop, two heads that share no group.

    Entropies are measured in the window, and in ENTROPIES, which is vanilla otherwise.
    """
    deep = range(layers - min(3, layers), layers)
    two = (0, heads // 2)

    def plan(layer: LayerPlan) -> LoopPlan:
        return LoopPlan(layers, tuple((n, layer) for n in deep))

    return {
        ENTROPIES: LoopPlan.empty(layers),
        "window": plan(LayerPlan(1, two, 0.5)),
        "fixed, 1 loop": plan(LayerPlan(1, two)),
        "fixed, 3 loops": plan(LayerPlan(3, two)),
        "all heads, 1 loop": plan(LayerPlan(1, tuple(range(heads)))),
        "all heads, 3 loops": plan(LayerPlan(3, tuple(range(heads)))),
        "block loop": plan(LayerPlan(block_loops=1)),
    }


def stepper(config: Config) -> tuple[Step, Runtime]:
    """A function that runs one step under a plan and gives its seconds."""
    # A second model would get code for any shape from torch.compile, which a run with one model never has.
    torch._dynamo.reset()
    groups = start_processes(config, discover({}))
    runtime = build_runtime(config, groups)
    size, length = config.train.micro_batch_size, config.model.seq_length
    tokens = torch.randint(config.model.vocab_size or 2, (size, length + 1), device=groups.device)
    batch = {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(size, length, device=groups.device),
        "position_ids": torch.arange(length, device=groups.device).expand(size, -1),
    }

    def step(plan: LoopPlan, measure: bool) -> float:
        apply_plan(runtime.model, plan)
        runtime.model.meter.enabled = measure
        synchronize(groups.device)
        start = time.perf_counter()
        train_step(runtime.engine, [batch], 1e-4, 1.0, groups)
        synchronize(groups.device)
        return time.perf_counter() - start

    return step, runtime


def steps(machine: Machine) -> int:
    """Timed steps of each structure."""
    return 2 if machine.dry else 10


def compare(
    machine: Machine, step: Step, vanilla: LoopPlan, grown: LoopPlan, measure: bool
) -> tuple[list[float], list[float]]:
    """Seconds of both in alternation, each first in half of the pairs, so that a drifting clock favours neither.

    ``measure``: entropies are measured in the grown step.
    """
    both = ((vanilla, False), (grown, measure))
    for arguments in both if machine.dry else both * 2:
        step(*arguments)
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(steps(machine)):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            times[which].append(step(*both[which]))
    return times


def _row(
    machine: Machine, config: Config, plan: LoopPlan, seconds: list[float], peak_gb: float | None
) -> dict[str, Any]:
    flops = step_flops(config.model, plan, config.train.micro_batch_size)
    median = statistics.median(seconds)
    rate = flops.model / median
    peak = machine.peak_flops_per_second
    return {
        "memory_gb": per(1.0, peak_gb),
        "step_ms": per(1e3, median),
        "tokens_per_second": per(1.0, config.train.micro_batch_size * config.model.seq_length / median),
        "model_tflops": per(1e-12, rate),
        "mfu_percent": None if peak is None else round(100 * rate / peak, 1),
        "share_of_matmul_ceiling": round(rate / machine.matmul_flops_per_second, 3),
    }


class Model:
    """A model that is built and has made a step; ``key``: what it was built from."""

    def __init__(self, machine: Machine, name: str, batch: int, fusions: str) -> None:
        shape = TINY if machine.dry else MODELS[name]
        self.shape, self.batch, self.name = shape, max(1, min(shape[4], batch)), name
        self.config = run_config(machine, *shape[:4], self.batch, fusions=fusions)
        self.vanilla = LoopPlan.empty(shape[0])
        self.step, self.runtime = stepper(self.config)
        self.step(self.vanilla, False)  # makes the optimizer's state

    def row(self, machine: Machine, structure: str, plan: LoopPlan, seconds: list[float]) -> dict[str, Any]:
        """What is said of a structure whose steps took so long; the peak of memory is of what ran since free()."""
        row = {"model": self.name, "structure": structure, "batch": self.batch, "loop": machine.backend}
        return row | _row(machine, self.config, plan, seconds, memory_gb(machine.device)[0])


_BUILT: dict[tuple[Any, ...], Model] = {}
"""The one model of this process, under what it was built from."""
_BATCHES: dict[str, int] = {}
"""Sequences per step of models whose first choice did not fit."""


def model(machine: Machine, name: str, fusions: str = "auto") -> Model:
    """The model of that name, built if another one (or one with other kernels) stands in its place."""
    batch = _BATCHES.get(name, MODELS[name][4])
    key = (name, batch, fusions, machine.backend, machine.attention)
    if key not in _BUILT:
        release()
        _BUILT[key] = Model(machine, name, batch, fusions)
    return _BUILT[key]


def release() -> None:
    """Destroy the model."""
    for built in _BUILT.values():
        built.runtime.engine.destroy()
    _BUILT.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def halving(rows: Rows) -> Rows:
    """Rows that are made again with half of the sequences where memory does not suffice."""

    @functools.wraps(rows)
    def made(machine: Machine, name: str, *rest: str) -> Iterator[dict[str, Any]]:
        while True:
            batch = _BATCHES.get(name, MODELS[name][4])
            try:
                yield from rows(machine, name, *rest)
                return
            except torch.OutOfMemoryError as error:
                yield {"model": name, "skipped": f"{' '.join(rest)} at batch {batch}: {first_line(error)}"}
                if batch == 1:
                    return
                _BATCHES[name] = batch // 2
            release()

    return made


@halving
def prepare(machine: Machine, name: str) -> Iterator[dict[str, Any]]:
    """Build the model and compile what its step needs; says nothing."""
    model(machine, name)
    yield from ()


@halving
def step_row(machine: Machine, name: str, structure: str) -> Iterator[dict[str, Any]]:
    """Steps of one structure: vanilla by itself, any other in alternation with it."""
    m = model(machine, name)
    if structure == "vanilla":
        m.step(m.vanilla, False)
        machine.free()
        yield m.row(machine, structure, m.vanilla, [m.step(m.vanilla, False) for _ in range(steps(machine))])
        return
    plan = structures(m.shape[0], m.shape[3])[structure]
    machine.free()
    plain, grown = compare(machine, m.step, m.vanilla, plan, structure in (ENTROPIES, "window"))
    base = step_flops(m.config.model, m.vanilla, 1).executed
    more = step_flops(m.config.model, plan, 1).executed / base - 1
    ratios = [b / a for a, b in zip(plain, grown, strict=True)]
    row = m.row(machine, structure, plan, grown)
    row["flops_overhead_percent"] = round(100 * more, 2)
    row["time_overhead_percent"] = round(100 * (statistics.median(ratios) - 1), 2)
    yield row


@halving
def profile_row(machine: Machine, name: str) -> Iterator[dict[str, Any]]:
    """The profile of a fixed step."""
    m = model(machine, name)
    yield {"model": name, "profile": profile(machine, m.step, structures(m.shape[0], m.shape[3]))}


@halving
def without_fusions(machine: Machine, name: str) -> Iterator[dict[str, Any]]:
    """The vanilla step without ``train.fusions``: what they gain, not in alternation."""
    m = model(machine, name, fusions="off")
    m.step(m.vanilla, False)
    machine.free()
    seconds = [m.step(m.vanilla, False) for _ in range(steps(machine))]
    yield m.row(machine, "vanilla, fusions off", m.vanilla, seconds)


def profile(machine: Machine, step: Step, plans: dict[str, LoopPlan]) -> list[dict[str, Any]]:
    """The kernels that a fixed step with one loop spends most time in."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    activity = ProfilerActivity.CUDA if machine.device.type == "cuda" else ProfilerActivity.CPU
    with record(activities=[activity]) as recorded:
        step(plans["fixed, 1 loop"], False)

    def microseconds(event: Any) -> float:
        return float(getattr(event, f"self_{'device' if activity.name == 'CUDA' else 'cpu'}_time_total"))

    events = sorted(recorded.key_averages(), key=microseconds, reverse=True)
    return [{"kernel": e.key[:90], "calls": e.count, "ms": per(1e-3, microseconds(e))} for e in events[:KERNELS_SHOWN]]
