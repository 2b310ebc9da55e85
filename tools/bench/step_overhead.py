#!/usr/bin/env python
"""What loops cost: FLOPs and wall time of a training step, grown against vanilla, in alternating pairs.

python tools/bench/step_overhead.py                      # 3 layers x 2 heads of an 8-layer model
python tools/bench/step_overhead.py --state window       # all heads of those layers loop
python tools/bench/step_overhead.py --profile            # where the extra time goes
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch

from megatron_sgt.cli import positive, run_main
from megatron_sgt.config import Config, parse_config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.environment import discover
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.parallel.device import synchronize
from megatron_sgt.planning.flops import step_flops


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in (
        ("layers", 8, "number of layers"),
        ("hidden", 512, "hidden size"),
        ("heads", 8, "query heads"),
        ("ffn", 1536, "width inside the SwiGLU MLP"),
        ("seq", 1024, "sequence length"),
        ("vocab", 8192, "vocabulary"),
        ("batch", 1, "sequences per step"),
        ("loop-layers", 3, "layers that loop (the deepest)"),
        ("loop-heads", 2, "heads that loop in each"),
        ("loops", 1, "loop passes"),
        ("pairs", 15, "measured pairs of steps"),
        ("threads", len(os.sched_getaffinity(0)), "CPU threads"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default {default})"
        )
    parser.add_argument("--state", choices=("fixed", "window"), default="fixed", help="structure to measure")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--profile", action="store_true", help="print the operations whose time grew most")
    args = parser.parse_args()
    for part, whole in (("loop-layers", "layers"), ("loop-heads", "heads")):
        some, most = getattr(args, part.replace("-", "_")), getattr(args, whole)
        if some > most:
            parser.error(f"argument --{part}: {some} is above --{whole} {most}")
    return args


def run_config(args: argparse.Namespace) -> Config:
    """The configuration of the measured model."""
    return parse_config(
        {
            "model": {
                "num_layers": args.layers,
                "hidden_size": args.hidden,
                "num_attention_heads": args.heads,
                "ffn_hidden_size": args.ffn,
                "seq_length": args.seq,
                "vocab_size": args.vocab,
            },
            "optim": {"lr": 1e-4},
            "train": {
                "train_iters": 1000,
                "micro_batch_size": args.batch,
                "global_batch_size": args.batch,
                "threads_per_rank": args.threads,
            },
            "parallel": {"device": args.device},
        }
    )


def grown_plan(args: argparse.Namespace) -> LoopPlan:
    """The structure that is compared with vanilla: the deepest layers loop."""
    step = args.heads // args.loop_heads
    kept = tuple(range(0, step * args.loop_heads, step))
    layer = LayerPlan(args.loops, kept, 0.5 if args.state == "window" else 0.0)
    return LoopPlan(
        args.layers, tuple((n, layer) for n in range(args.layers - args.loop_layers, args.layers))
    )


def step_timer(config: Config) -> Callable[[LoopPlan], float]:
    """Build model and engine; the function returned runs one training step and gives its seconds."""
    groups = start_processes(config, discover({}))
    runtime = build_runtime(config, groups)
    size, length = config.train.micro_batch_size, config.model.seq_length
    tokens = torch.randint(config.model.padded_vocab_size(), (size, length + 1))
    batch = {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(size, length),
        "position_ids": torch.arange(length).expand(size, -1),
    }

    def run(plan: LoopPlan) -> float:
        apply_plan(runtime.model, plan)
        synchronize(groups.device)
        start = time.perf_counter()
        train_step(runtime.engine, [batch], 1e-4, 1.0, groups)
        synchronize(groups.device)
        return time.perf_counter() - start

    return run


def main() -> None:
    """Build one engine, alternate its plan, print both overheads."""
    args = parse()
    config = run_config(args)
    vanilla, grown = LoopPlan.empty(args.layers), grown_plan(args)
    base, more = (step_flops(config.model, plan, args.batch) for plan in (vanilla, grown))
    print(
        f"{args.state}: {args.loop_layers} of {args.layers} layers, {args.loop_heads} of {args.heads} heads"
    )
    print(f"FLOPs overhead, linear layers only      {100 * (more.linear / base.linear - 1):6.2f} %")
    print(f"FLOPs overhead, attention included      {100 * (more.executed / base.executed - 1):6.2f} %")
    run = step_timer(config)
    report_times(run, vanilla, grown, args.pairs)
    if args.profile:
        report_profile(run, vanilla, grown)


def report_times(run: Callable[[LoopPlan], float], vanilla: LoopPlan, grown: LoopPlan, pairs: int) -> None:
    """Alternate the two (in both orders, so that a drifting machine favours neither) and print the ratio."""
    for plan in (vanilla, grown, vanilla, grown):
        run(plan)
    times: list[tuple[float, float]] = []
    for index in range(pairs):
        order = (vanilla, grown) if index % 2 == 0 else (grown, vanilla)
        seconds = {plan: run(plan) for plan in order}
        times.append((seconds[vanilla], seconds[grown]))
    ratios = sorted(b / a for a, b in times)
    low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
    base, more = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"step time, median                       {1e3 * base:8.1f} ms vanilla  {1e3 * more:8.1f} ms grown")
    print(
        f"step time ratio, median of {pairs} pairs      {statistics.median(ratios):6.3f}"
        f"   (middle half {low:.3f} to {high:.3f})"
    )


def report_profile(run: Callable[[LoopPlan], float], vanilla: LoopPlan, grown: LoopPlan) -> None:
    """Print the operations whose own time grew most between the two structures."""
    from torch.profiler import profile

    own: list[dict[str, float]] = []
    for plan in (vanilla, grown):
        with profile() as prof:
            for _ in range(3):
                run(plan)
        own.append({e.key: e.self_cpu_time_total / 3e3 for e in prof.key_averages()})
    growth = sorted(((own[1][k] - own[0].get(k, 0.0), k) for k in own[1]), reverse=True)
    for milliseconds, name in growth[:12]:
        print(f"{milliseconds:+9.2f} ms  {name}")


if __name__ == "__main__":
    run_main(main)
