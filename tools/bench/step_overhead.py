#!/usr/bin/env python
"""What loops cost: FLOPs and wall time of a training step, grown against vanilla, in alternating pairs.

python tools/bench/step_overhead.py                      # 3 layers x 2 heads of an 8-layer model
python tools/bench/step_overhead.py --state window       # all heads of those layers loop
python tools/bench/step_overhead.py --profile            # where the extra time goes
python tools/bench/step_overhead.py --ema                # an average of the weights (train.ema_decay) instead of loops
python tools/bench/step_overhead.py --peer transformers  # the vanilla step against transformers' Llama instead

The peer is ``LlamaForCausalLM`` of the same shape in fp32, with torch's attention (sdpa), its gradient norm clipped
at 1 and torch's fused AdamW: what a plain training loop would do. Both live in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from megatron_sgt.cli import positive, run_main
from megatron_sgt.config import Config, parse_config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.hooks.ema import EmaHook
from megatron_sgt.engine.step import train_step
from megatron_sgt.errors import SGTError
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.environment import discover
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.parallel.device import synchronize
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.planning.parameters import parameter_count

LEARNING_RATE, CLIP_GRAD = 1e-4, 1.0


class Seconds(NamedTuple):
    """Of one step: by the clock, and of this process on all its CPUs, which other processes disturb less."""

    clock: float
    cpu: float


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--ema", action="store_true", help="compare the vanilla step with and without train.ema_decay")
    parser.add_argument(
        "--peer", choices=("transformers",), help="compare the vanilla step with this library's, in fp32"
    )
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
            "optim": {"lr": LEARNING_RATE, "clip_grad": CLIP_GRAD},
            "train": {
                "train_iters": 1000,
                "micro_batch_size": args.batch,
                "global_batch_size": args.batch,
                "threads_per_rank": args.threads,
                "precision": "fp32" if args.peer else "auto",
                "ema_decay": 0.999 if args.ema else 0.0,
            },
            "parallel": {"device": args.device},
        }
    )


def grown_plan(args: argparse.Namespace) -> LoopPlan:
    """The structure that is compared with vanilla: the deepest layers loop."""
    step = args.heads // args.loop_heads
    kept = tuple(range(0, step * args.loop_heads, step))
    layer = LayerPlan(args.loops, kept, 0.5 if args.state == "window" else 0.0)
    return LoopPlan(args.layers, tuple((n, layer) for n in range(args.layers - args.loop_layers, args.layers)))


def step_timer(config: Config) -> tuple[Callable[..., Seconds], torch.device]:
    """Build model and engine; the function returned runs one training step and times it.

    Its arguments: a plan, and whether the step updates an average of the weights.
    """
    groups = start_processes(config, discover({}))
    runtime = build_runtime(config, groups)
    batch = random_batch(config)
    average = EmaHook(runtime.engine, config.train.ema_decay, groups).average if config.train.ema_decay else None

    def run(plan: LoopPlan, averaged: bool = False) -> Seconds:
        def step() -> None:
            train_step(runtime.engine, [batch], LEARNING_RATE, CLIP_GRAD, groups)
            if averaged and average is not None:
                average.update()

        apply_plan(runtime.model, plan)
        return timed(step, groups.device)

    return run, groups.device


def peer_timer(config: Config, device: torch.device) -> Callable[[], Seconds]:
    """The same for transformers' Llama.

    Raises:
        SGTError: it has not as many weights as ours.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_attention_heads,
            vocab_size=shape.padded_vocab_size(),
            max_position_embeddings=shape.seq_length,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation="sdpa",
        )
    ).to(device)
    if llama.num_parameters() != parameter_count(shape):
        raise SGTError(f"{llama.num_parameters()} weights, not {parameter_count(shape)}: another model")
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=LEARNING_RATE, weight_decay=config.optim.weight_decay, fused=True
    )
    batch = random_batch(config)
    tokens, labels = batch["tokens"].to(device), batch["labels"].to(device)

    def step() -> None:
        llama(input_ids=tokens, labels=labels, shift_labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad()

    llama.train()
    return lambda: timed(step, device)


def random_batch(config: Config) -> dict[str, torch.Tensor]:
    """One micro-batch of random tokens."""
    size, length = config.train.micro_batch_size, config.model.seq_length
    tokens = torch.randint(config.model.padded_vocab_size(), (size, length + 1))
    return {
        "tokens": tokens[:, :-1].contiguous(),
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones(size, length),
        "position_ids": torch.arange(length).expand(size, -1),
    }


def timed(step: Callable[[], object], device: torch.device) -> Seconds:
    """Time of ``step``, the device's work included."""
    synchronize(device)
    start, used = time.perf_counter(), time.process_time()
    step()
    synchronize(device)
    return Seconds(time.perf_counter() - start, time.process_time() - used)


def main() -> None:
    """Build one engine, alternate its plan (or it and the peer), print both overheads."""
    args = parse()
    config = run_config(args)
    vanilla, grown = LoopPlan.empty(args.layers), grown_plan(args)
    if args.peer:
        run, device = step_timer(config)
        report_times({args.peer: peer_timer(config, device), "vanilla": lambda: run(vanilla)}, args.pairs)
        return
    if args.ema:
        run, _ = step_timer(config)
        print(f"an average of {parameter_count(config.model):,} weights")
        report_times({"vanilla": lambda: run(vanilla), "averaged": lambda: run(vanilla, True)}, args.pairs)
        return
    base, more = (step_flops(config.model, plan, args.batch) for plan in (vanilla, grown))
    print(f"{args.state}: {args.loop_layers} of {args.layers} layers, {args.loop_heads} of {args.heads} heads")
    print(f"FLOPs overhead, linear layers only      {100 * (more.linear / base.linear - 1):6.2f} %")
    print(f"FLOPs overhead, attention included      {100 * (more.executed / base.executed - 1):6.2f} %")
    run, _ = step_timer(config)
    report_times({"vanilla": lambda: run(vanilla), "grown": lambda: run(grown)}, args.pairs)
    if args.profile:
        report_profile(run, vanilla, grown)


def report_times(runs: dict[str, Callable[[], Seconds]], pairs: int) -> None:
    """Alternate the two (in both orders, so that a drifting machine favours neither) and print the ratio."""
    for _ in range(2):
        for run in runs.values():
            run()
    (first, base), (second, other) = runs.items()
    found: list[tuple[Seconds, Seconds]] = []
    for index in range(pairs):
        if index % 2 == 0:
            denominator, numerator = base(), other()
        else:
            numerator, denominator = other(), base()
        found.append((denominator, numerator))
    for index, name in enumerate(("step time", "CPU time")):
        times = [(a[index], b[index]) for a, b in found]
        ratios = sorted(b / a for a, b in times)
        low, high = ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]
        less, more = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name}, median                       {less:8.1f} ms {first}  {more:8.1f} ms {second}")
        print(
            f"{name} ratio, median of {pairs} pairs      {statistics.median(ratios):6.3f}"
            f"   (middle half {low:.3f} to {high:.3f})"
        )


def report_profile(run: Callable[[LoopPlan], Seconds], vanilla: LoopPlan, grown: LoopPlan) -> None:
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
