"""Whole training steps: vanilla and grown structures in alternation, under DeepSpeed ZeRO-1 on one device."""

from __future__ import annotations

import gc
import itertools
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
# layers, hidden, ffn, heads, sequences per step
MODELS = {"300M": (24, 1024, 2752, 16, 4), "1.2B": (24, 2048, 5504, 16, 2)}

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
                "loop_backend": "triton",
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
    for pair in range(2 if machine.dry else 10):
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


def one_model(machine: Machine, name: str, shape: tuple[int, int, int, int, int]) -> Iterator[dict[str, Any]]:
    """Rows of every structure; vanilla's time is the one measured beside that structure."""
    config = run_config(machine, *shape)
    vanilla = LoopPlan.empty(config.model.num_layers)
    base = step_flops(config.model, vanilla, 1).executed
    step, runtime = stepper(config)
    step(vanilla, False)  # makes the optimizer's state
    machine.free()
    step(vanilla, False)
    vanilla_gb = memory_gb(machine.device)[0]
    first = {"model": name, "structure": "vanilla", "batch": shape[4]}
    for structure, plan in structures(shape[0], shape[3]).items():
        if machine.late:
            yield {"model": name, "skipped": f"{structure}: the time is used up"}
            continue
        machine.free()
        plain, grown = compare(machine, step, vanilla, plan, structure in (ENTROPIES, "window"))
        ratios = [b / a for a, b in zip(plain, grown, strict=True)]
        row: dict[str, Any] = {"model": name, "structure": structure, "batch": shape[4]}
        row |= _row(machine, config, plan, grown, memory_gb(machine.device)[0])
        more = step_flops(config.model, plan, 1).executed / base - 1
        row["flops_overhead_percent"] = round(100 * more, 2)
        row["time_overhead_percent"] = round(100 * (statistics.median(ratios) - 1), 2)
        if first:
            yield {**first, **_row(machine, config, vanilla, plain, vanilla_gb)}
            first = {}
        yield row
    if not machine.late:
        yield {"model": name, "profile": profile(machine, step, structures(shape[0], shape[3]))}
    runtime.engine.destroy()


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
    return [
        {"kernel": e.key[:90], "calls": e.count, "ms": per(1e-3, microseconds(e))}
        for e in events[:KERNELS_SHOWN]
    ]


def without_fusions(
    machine: Machine, name: str, shape: tuple[int, int, int, int, int]
) -> Iterator[dict[str, Any]]:
    """The vanilla step without ``train.fusions``: what they gain, in the same process but not in alternation."""
    if machine.late:
        yield {"model": name, "skipped": "vanilla, fusions off: the time is used up"}
        return
    config = run_config(machine, *shape, fusions="off")
    vanilla = LoopPlan.empty(config.model.num_layers)
    step, runtime = stepper(config)
    for _ in range(1 if machine.dry else 3):
        step(vanilla, False)
    machine.free()
    seconds = [step(vanilla, False) for _ in range(1 if machine.dry else 10)]
    row = {"model": name, "structure": "vanilla, fusions off", "batch": shape[4]}
    yield row | _row(machine, config, vanilla, seconds, memory_gb(machine.device)[0])
    runtime.engine.destroy()


def run(machine: Machine) -> Iterator[dict[str, Any]]:
    """Every model that fits, at half of the batch if it must be; what does not is reported, not fatal."""
    models = {"tiny": (2, 128, 128, 2, 1)} if machine.dry else MODELS
    parts = [(one_model, name) for name in models] + [(without_fusions, list(models)[-1])]
    for part, name in parts:
        shape = models[name]
        for batch in itertools.takewhile(bool, (shape[4], shape[4] // 2)):
            try:
                yield from part(machine, name, (*shape[:4], batch))
                break
            except torch.OutOfMemoryError as error:
                yield {"model": name, "skipped": f"batch {batch}: {first_line(error)}"}
            finally:
                gc.collect()
                machine.free()
