#!/usr/bin/env python
"""Time per step by component and memory per rank, for 1.2B to 70B parameters on 8 to 4096 GPUs.

A model that is not calibrated: its operations, bytes and calls are tested against the program (docs/planning.md), its
speeds are assumed.

python tools/bench/scaling_model.py                        # all sizes on H100s
python tools/bench/scaling_model.py --gpu a100 --sizes 7b --gpus 32 256
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from megatron_sgt.cli import number, positive, run_main, words
from megatron_sgt.config import Config, load_config
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.planning.hardware import GPUS, USABLE, find_gpu
from megatron_sgt.planning.rank_memory import peak_memory
from megatron_sgt.planning.step_time import NOT_CALIBRATED, Machine, StepTime, step_time
from megatron_sgt.planning.structure import final_plan

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SIZES = ("1.2b", "7b", "13b", "70b")
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PRECISION = "bf16"


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=words, default="h100", help=f"one of {', '.join(GPUS)} [%(default)s]")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=SIZES, metavar="SIZE")
    parser.add_argument("--gpus", nargs="+", type=positive, default=COUNTS, metavar="N")
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N")
    parser.add_argument("--kernel-efficiency", type=number, default=0.65, metavar="X", help="share of the peak [0.65]")
    parser.add_argument("--link-efficiency", type=number, default=0.8, metavar="X", help="share of a link [0.8]")
    parser.add_argument("--latency", type=number, default=10e-6, metavar="S", help="of a collective [1e-5 s]")
    return parser.parse_args()


def layouts(size: str, machine: Machine) -> Iterator[Config]:
    """The example's configuration under every layout that is tried, the simplest first."""
    path = CONFIGS / f"sgt_{size}.yaml"
    base = load_config(path, ["model.vocab_size=32000"])
    for recompute in ("none", "full"):
        for zero in (1, 3):
            for tensor in (1, 2, 4, 8):
                if tensor > machine.gpus_per_node or base.model.num_query_groups % tensor:
                    continue
                for micro in sorted({base.train.micro_batch_size, 1}, reverse=True):
                    yield load_config(
                        path,
                        [
                            "model.vocab_size=32000",
                            f"parallel.tensor_model_parallel_size={tensor}",
                            f"parallel.sequence_parallel={str(tensor > 1).lower()}",
                            f"parallel.zero_stage={zero}",
                            f"train.micro_batch_size={micro}",
                            f"train.recompute_granularity={recompute}",
                        ],
                    )


def best_layout(
    size: str, gpus: int, machine: Machine, candidates: list[Config]
) -> tuple[Config, dict[str, StepTime], float] | None:
    """The fastest candidate (in the model) whose batch divides and whose memory fits.

    With the times of vanilla and of the final structure looped naively (owner) and balanced.
    """
    found: list[tuple[Config, dict[str, StepTime], float]] = []
    for config in candidates:
        train = config.train
        if gpus % config.parallel.model_parallel_size or train.global_batch_size % (
            train.micro_batch_size * config.data_parallel_size(gpus)
        ):
            continue
        plans = (LoopPlan.empty(config.model.num_layers), final_plan(config, together=True))
        memory = peak_memory(config, plans, gpus, PRECISION)
        if memory > USABLE * machine.gpu.memory:
            continue
        vanilla, plan = plans
        times = {
            "vanilla": step_time(config, vanilla, gpus, machine, PRECISION, "owner"),
            "naive": step_time(config, plan, gpus, machine, PRECISION, "owner"),
            "balanced": step_time(config, plan, gpus, machine, PRECISION, "balanced"),
        }
        found.append((config, times, memory))
    return min(found, key=lambda one: one[1]["balanced"].total) if found else None


HEADER = (
    "    gpus  TP    DP  Z  mb  rec |  step s  compute   elem     TP     DP | loops naive      balanced | "
    "  MFU  GB/rank"
)


def row(gpus: int, found: tuple[Config, dict[str, StepTime], float], machine: Machine) -> str:
    """One line of the table."""
    config, times, memory = found
    parallel, train, t = config.parallel, config.train, times["balanced"]
    tensor, replicas = parallel.tensor_model_parallel_size, config.data_parallel_size(gpus)
    base = times["vanilla"].total
    naive, balanced = (100 * times[way].loops / base for way in ("naive", "balanced"))
    model = step_flops(config.model, final_plan(config, together=True), train.global_batch_size).model
    mfu = model / t.total / gpus / machine.gpu.peak(PRECISION)
    return (
        f"{gpus:8,} {tensor:3d} {replicas:5d} {parallel.zero_stage:2d} {train.micro_batch_size:3d} "
        f"{train.recompute_granularity:>4} | {t.total:7.2f} {t.compute:8.2f} {t.elementwise:6.2f} "
        f"{t.tensor_parallel:6.2f} {t.data_parallel:6.2f} | {1e3 * times['naive'].loops:5.0f}ms {naive:+4.1f}% "
        f"{1e3 * t.loops:5.0f}ms {balanced:+4.1f}% | {100 * mfu:5.1f}% {memory / 1e9:8.1f} | {NOT_CALIBRATED}"
    )


def assumptions(machine: Machine) -> str:
    """What the figures rest on, for the reader."""
    gpu = machine.gpu
    return "\n".join(
        (
            f"A model, {NOT_CALIBRATED}. Assumed, for nodes of {machine.gpus_per_node}:",
            f"  {gpu.driver_name}: {gpu.peak(PRECISION) / 1e12:.0f} TFLOP/s dense bf16, {gpu.memory / 1e9:.0f} GB of "
            f"which {100 * USABLE:.0f} % usable",
            f"  matrix products and attention reach {100 * machine.kernel_efficiency:.0f} % of the peak; causal ones "
            "count half",
            f"  elem: what is read and written between them, at {gpu.memory_bandwidth / 1e12:.2f} TB/s",
            f"  collectives reach {100 * machine.link_efficiency:.0f} % of {gpu.link / 1e9:.0f} GB/s in a node, "
            f"of {gpu.network / 1e9:.0f} GB/s per GPU between nodes;",
            f"  {1e6 * machine.latency:.0f} us x log2(ranks) for each; nothing overlaps",
            "  1,024 sequences of 4,096 tokens per step. Times are of the final structure, its kept heads on one rank:",
            "  naive loops them there, balanced on all ranks. The layout is the fastest that fits, in this model.",
        )
    )


def main() -> None:
    """Print the assumptions and a table for every size."""
    args = parse()
    machine = Machine(
        find_gpu(args.gpu), args.gpus_per_node, args.kernel_efficiency, args.link_efficiency, args.latency
    )
    print(assumptions(machine))
    for size in args.sizes:
        candidates = list(layouts(size, machine))
        print(f"\n{size} (examples/configs/sgt_{size}.yaml)\n{HEADER}")
        for gpus in args.gpus:
            found = best_layout(size, gpus, machine, candidates)
            print(row(gpus, found, machine) if found else f"{gpus:8,}  does not fit, or 1,024 sequences do not divide")


if __name__ == "__main__":
    run_main(main)
