#!/usr/bin/env python
"""Memory and time of tools/convert_to_hf.py on a checkpoint of 2 tensor-parallel x 2 data-parallel ranks at ZeRO 1.

python tools/bench/export_memory.py                                    217M parameters, about 2 GB of disk
python tools/bench/export_memory.py --layers 24 --hidden 2048          1.3B parameters, about 11 GB

The checkpoint holds random weights. Two exports are watched: a toy's, which shows what the libraries take, and this
model's. Counted is memory that the process has allocated (RssAnon); the checkpoint's pages, which are mapped from
disk and which the system takes back when it needs them, are counted in the last column (VmRSS). Linux only.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_sgt.cli import positive, run_main

TOOL = Path(__file__).resolve().parents[1] / "convert_to_hf.py"
TP, DP = 2, 2


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 12), ("hidden", 1024), ("heads", 16), ("vocab", 32000)):
        parser.add_argument(f"--{name}", type=positive, default=default, metavar="N", help="[%(default)s]")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="[%(default)s]")
    return parser.parse_args()


def run_config(args: argparse.Namespace) -> Any:
    """A grown Llama-like model of the asked size."""
    from megatron_sgt.config import parse_config

    return parse_config(
        {
            "model": {
                "num_layers": args.layers, "hidden_size": args.hidden, "num_attention_heads": args.heads,
                "seq_length": 2048, "vocab_size": args.vocab,
            },
            "optim": {"lr": 1e-4},
            "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 2},
            "parallel": {"tensor_model_parallel_size": TP, "zero_stage": 1, "device": "cpu"},
        }
    )  # fmt: skip


def write_checkpoint(folder: Path, config: Any) -> tuple[int, int]:
    """A committed checkpoint of random weights; returns the number of all parameters and of the largest."""
    import torch

    from megatron_sgt.arch.weights import weights
    from megatron_sgt.checkpoint import layout, manifest
    from megatron_sgt.growth import build_schedule

    model = config.model
    shapes = {f"gpt.{w.megatron}": torch.Size(w.shard_shape(TP)) for w in weights(model)}
    folder.mkdir(parents=True)
    size = sum(math.prod(shape) for shape in shapes.values())
    for tp_rank in range(TP):
        torch.save({"param_shapes": [shapes]}, folder / layout.model_file(tp_rank))
        for dp_rank in range(DP):
            part = torch.rand(-(-size // (2 * DP)) * 2)[: size - dp_rank * (-(-size // (2 * DP)) * 2)]
            moments = {"exp_avg": torch.empty(0), "exp_avg_sq": torch.empty(0)}  # never read
            content = {
                "single_partition_of_fp32_groups": [part],
                "base_optimizer_state": {
                    "state": {0: {"step": torch.tensor(1.0), **moments}},
                    "param_groups": [{}],
                },
                "dynamic_loss_scale": False,
            }
            name = layout.files_of_rank({"zero_stage": 1}, tp_rank, dp_rank)[1]
            torch.save({"optimizer_state_dict": content}, folder / name)
    schedule = build_schedule(config.growth, model.num_layers, model.num_attention_heads)
    grown = {"layer": 1, "loops": 1, "kept_heads": [0, 1], "chosen_at": 1}
    state = {
        "layout": {"tensor_model_parallel_size": TP, "data_parallel_size": DP, "zero_stage": 1},
        "trainer": {"step": 1, "consumed_samples": 2, "skipped_steps": 0, "consecutive_skipped": 0},
        "hooks": {
            "growth": {
                "schedule": {**schedule.state_dict(), "phase": "fixed", "step": 1000, "grown": [grown]},
                "events": [],
            }
        },
    }
    layout.write_json(folder / layout.STATE_FILE, state)
    (folder / layout.CONFIG_FILE).write_text(config.to_yaml(), encoding="utf-8")
    manifest.write_manifest(folder, {})
    largest = max(TP * math.prod(shape) for shape in shapes.values())
    return size * TP, largest


def watch(command: list[str]) -> tuple[float, float, float]:
    """Run ``command``; its peak RssAnon and VmRSS in bytes, and its seconds."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"RssAnon": 0.0, "VmRSS": 0.0}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:  # it has just ended
            break
        for name, _, value in (line.partition(":") for line in lines):
            if name in peaks and value.strip():
                peaks[name] = max(peaks[name], 1024.0 * int(value.split()[0]))
        time.sleep(0.005)
    if process.wait() != 0:
        raise RuntimeError(f"{' '.join(command)} ended with exit code {process.returncode}")
    return peaks["RssAnon"], peaks["VmRSS"], time.perf_counter() - start


def main() -> None:
    """Print one line per model."""
    args = parse()
    toy = argparse.Namespace(**{**vars(args), "layers": 4, "hidden": 64, "heads": 4, "vocab": 128})
    print("parameters   weights (fp32)   largest   peak allocated   above the toy   seconds   peak with mapped files")
    base = 0.0
    for sizes in (toy, args):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = Path(folder, "global_step1")
            total, largest = write_checkpoint(checkpoint, run_config(sizes))
            command = [sys.executable, str(TOOL), "--load", str(checkpoint), "--output", str(Path(folder, "hf")),
                       "--dtype", args.dtype, "--skip-parity"]  # fmt: skip
            anonymous, resident, seconds = watch(command)
        base = base or anonymous
        mb = [f"{value / 1e6:,.0f} MB" for value in (4 * total, 4 * largest, anonymous, anonymous - base, resident)]
        print(f"{total / 1e6:8,.1f} M {mb[0]:>16} {mb[1]:>9} {mb[2]:>16} {mb[3]:>15} {seconds:9.1f} {mb[4]:>24}")


if __name__ == "__main__":
    run_main(main)
