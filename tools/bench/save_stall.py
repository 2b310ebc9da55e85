#!/usr/bin/env python
"""How long training stands still for a checkpoint: asynchronous saves against synchronous ones, in one run.

python tools/bench/save_stall.py                                  # 70 M parameters, alone
torchrun --nproc-per-node 2 tools/bench/save_stall.py --zero 3    # every rank's longest stall counts

Training steps are taken while an asynchronous save is written; their slowdown is shown beside the stall.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import megatron_sgt.engine  # noqa: F401  quiets the libraries that the next lines import
from megatron_sgt.checkpoint.save import Saver
from megatron_sgt.cli import path, positive, run_main
from megatron_sgt.config import Config, parse_config
from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.launch.environment import discover
from megatron_sgt.metrics.units import file_size, si
from megatron_sgt.parallel.collectives import gather_or_raise
from megatron_sgt.parallel.groups import ParallelGroups, destroy_groups
from megatron_sgt.planning.parameters import parameter_count


@dataclass
class Times:
    """Seconds: of saves (until they are whole), of the standstill of each, of steps with and without one."""

    sync: list[float] = field(default_factory=list)
    stall: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    step_beside: list[float] = field(default_factory=list)
    num_bytes: int = 0


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("layers", 8, "number of layers"),
        ("hidden", 768, "hidden size"),
        ("vocab", 8192, "vocabulary"),
        ("seq", 64, "sequence length"),
        ("saves", 3, "saves of each kind"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default {default})"
        )
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=1, help="ZeRO stage")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dir", type=path, help="where to save (default: the system's temporary folder)")
    return parser.parse_args()


def run_config(args: argparse.Namespace, folder: Path, world_size: int, async_save: bool) -> Config:
    """The configuration of the measured run."""
    return parse_config(
        {
            "model": {
                "num_layers": args.layers,
                "hidden_size": args.hidden,
                "num_attention_heads": args.hidden // 64,
                "ffn_hidden_size": 4 * args.hidden,
                "seq_length": args.seq,
                "vocab_size": args.vocab,
            },
            "growth": {"method": "vanilla"},
            "optim": {"lr": 1e-4},
            "train": {
                "train_iters": 1000,
                "micro_batch_size": 1,
                "global_batch_size": world_size,
                "precision": "fp32" if args.zero == 0 else "auto",
            },
            "parallel": {"device": args.device, "zero_stage": args.zero},
            "checkpoint": {"save": str(folder), "keep_last": 1, "async_save": async_save},
        }
    )


def measure(args: argparse.Namespace, folder: Path, config: Config, groups: ParallelGroups) -> Times:
    """Alternate a synchronous and an asynchronous save; the state is that after a training step."""
    runtime = build_runtime(config, groups)
    times, batch = Times(), random_batch(config)

    def step() -> float:
        return train_step(runtime.engine, [batch], 1e-4, 1.0, groups).seconds

    later = run_config(args, folder, groups.world_size, async_save=True)
    now_saver, later_saver = (Saver(c, runtime.engine, groups) for c in (config, later))
    step()
    later_saver.prepare()
    state = {"trainer": {"step": 0, "consumed_samples": 0}, "hooks": {}}
    for number in range(1, args.saves + 1):
        times.step += [step() for _ in range(3)]
        now_saver.start(2 * number - 1, state)
        saved = now_saver.poll(wait=True)
        assert saved is not None
        times.sync.append(saved.seconds)
        times.num_bytes = saved.num_bytes
        later_saver.start(2 * number, state)
        while (saved := later_saver.poll()) is None:
            times.step_beside.append(step())
        times.stall.append(saved.stall_s)
        times.whole.append(saved.seconds)
    for values in (times.sync, times.stall):
        values[:] = slowest(values, groups)
    return times


def slowest(values: list[float], groups: ParallelGroups) -> list[float]:
    """The largest of all ranks, one by one."""
    return [max(ranks) for ranks in zip(*gather_or_raise(lambda: values, groups), strict=True)]


def random_batch(config: Config) -> dict[str, Any]:
    """One micro-batch of random tokens."""
    model = config.model
    tokens = torch.randint(model.padded_vocab_size(), (1, model.seq_length + 1))
    return {
        "tokens": tokens[:, :-1],
        "labels": tokens[:, 1:],
        "loss_mask": torch.ones(1, model.seq_length),
        "position_ids": torch.arange(model.seq_length).expand(1, -1),
    }


def report(times: Times, parameters: int, world_size: int) -> str:
    """The table."""
    sync = statistics.median(times.sync)
    first, *others = times.stall
    rows: list[tuple[str, str]] = [
        ("model", f"{si(parameters, ' ')} parameters, {file_size(times.num_bytes)}, {world_size} ranks"),
        ("synchronous save", f"{sync:.3f} s (median of {len(times.sync)})"),
        ("stall of the first asynchronous save", f"{first:.3f} s = {first / sync:.1%}"),
    ]
    if others:
        later = max(others)
        rows.append(("stall of a later one, the longest", f"{later:.3f} s = {later / sync:.1%}"))
    rows.append(("whole on disk after", f"{statistics.median(times.whole):.3f} s"))
    if times.step_beside:
        alone, beside = statistics.median(times.step), statistics.median(times.step_beside)
        rows.append(("training step", f"{alone:.3f} s, {beside:.3f} s while a save is written"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def main() -> None:
    """Measure and print."""
    args = parse()
    info = discover()
    groups = start_processes(run_config(args, Path(), info.world_size, async_save=False), info)
    made = tempfile.mkdtemp(prefix="save_stall_", dir=args.dir) if groups.is_main else ""
    folder = Path(gather_or_raise(lambda: made, groups)[0])
    config = run_config(args, folder, info.world_size, async_save=False)
    try:
        times = measure(args, folder, config, groups)
    finally:
        if groups.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if groups.is_main:
        print(report(times, parameter_count(config.model), groups.world_size))
    destroy_groups()


if __name__ == "__main__":
    run_main(main)
