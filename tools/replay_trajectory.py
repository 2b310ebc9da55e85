#!/usr/bin/env python
r"""Repeat a recorded trajectory and compare with it, in any parallel layout.

Without a launcher it starts one copy of the model itself, tensor x pipeline parallel ranks on this machine; data
parallelism needs one:

python tools/replay_trajectory.py tests/golden/a.safetensors --out repeated.safetensors --compare
python tools/replay_trajectory.py tests/golden/a.safetensors --out repeated.safetensors --compare \
    --pipeline-parallel 2 --virtual 2
torchrun --nproc-per-node 4 tools/replay_trajectory.py tests/golden/a.safetensors \
    --out repeated.safetensors --tensor-parallel 2 --pipeline-parallel 2 --zero 1 --compare

Inputs are the file's init/*, tokens, their documents, probe_tokens and metadata only; --compare reads the rest of it
afterwards and exits with 1 beyond the tolerances.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from megatron_sgt.cli import output, path, positive, words
from megatron_sgt.guard.ending import place, run_rank


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=path, help="trajectory file (safetensors)")
    parser.add_argument("--out", type=output, required=True, metavar="FILE", help="file to write, with the same keys")
    parser.add_argument("--tensor-parallel", type=positive, default=1, metavar="N", help="tensor-parallel size")
    parser.add_argument("--pipeline-parallel", type=positive, default=1, metavar="P", help="stages of the pipeline")
    parser.add_argument(
        "--virtual",
        "--virtual-pipeline-parallel",
        dest="virtual",
        type=positive,
        default=1,
        metavar="V",
        help="parts of every stage, interleaved (under torchrun in full: it has a --virtual-local-rank)",
    )
    parser.add_argument(
        "--pipeline-layout",
        type=words,
        default="auto",
        metavar="L",
        help="layers of every part (1,2,2,1 or Et|tt|tt|tL) [%(default)s]",
    )
    parser.add_argument("--zero", type=int, default=1, choices=(0, 1, 2, 3), help="DeepSpeed ZeRO stage")
    parser.add_argument(
        "--micro-batch",
        type=positive,
        metavar="N",
        help="sequences per micro-batch (default: the file's, or what fits)",
    )
    parser.add_argument("--sequence-parallel", action="store_true", help="shard activations between the linears")
    parser.add_argument("--loop-method", default="auto", choices=("auto", "owner", "balanced"), help="[%(default)s]")
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"), help="[%(default)s]")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="[%(default)s]")
    parser.add_argument(
        "--compare", action="store_true", help="print differences from the file; exit 1 beyond tolerance"
    )
    return parser.parse_args()


def start_ranks(ranks: int) -> int:
    """Run this command again as ``ranks`` ranks; returns torchrun's exit code."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--"]
    return subprocess.run([*launcher, *sys.argv], check=False).returncode


def main() -> int:
    """Repeat, write, compare."""
    args = parse()
    from trajectory_parts import run as rp

    from megatron_sgt.engine.build import start_processes
    from megatron_sgt.parallel.groups import destroy_groups

    tensors, meta = rp.read_trajectory(args.file)
    info, copy = place(), args.tensor_parallel * args.pipeline_parallel
    per_rank = meta["global_batch"] // max(1, info.world_size // copy)
    micro = args.micro_batch or min(meta["micro_batch"], per_rank)
    overrides = {
        "parallel": {
            "tensor_model_parallel_size": args.tensor_parallel,
            "pipeline_model_parallel_size": args.pipeline_parallel,
            "virtual_pipeline_model_parallel_size": args.virtual,
            "pipeline_model_parallel_layout": args.pipeline_layout,
            "zero_stage": args.zero,
            "sequence_parallel": args.sequence_parallel,
            "loop_method": args.loop_method,
            "device": args.device,
        },
        "train": {"micro_batch_size": micro, "recompute_granularity": args.recompute},
    }
    config = rp.trajectory_config(tensors, meta, overrides)
    if copy > 1 and info.launcher == "single":
        return start_ranks(copy)
    groups = start_processes(config, info)
    result, result_meta = rp.repeat(config, groups, rp.inputs_of(tensors), meta)
    status = 0
    if groups.is_main:
        rp.write_trajectory(Path(args.out), result, result_meta)
        if args.compare:
            differences, problems = rp.compare(result, result_meta, tensors, meta)
            for name, value in differences.items():
                print(f"{name:14s} max |difference| {value:.2e}")
            print("\n".join(problems) if problems else "all events equal, everything within tolerance")
            status = 1 if problems else 0
    destroy_groups()
    return status


if __name__ == "__main__":
    sys.exit(run_rank(main))
