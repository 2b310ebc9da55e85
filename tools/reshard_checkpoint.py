#!/usr/bin/env python
"""Convert a checkpoint into one that loads under any layout: tensor, pipeline, data parallel sizes and ZeRO stage.

A run that meets a checkpoint of another layout does this by itself; the tool does it beforehand, on any machine
without a GPU.

python tools/reshard_checkpoint.py --load runs/a/checkpoints --output runs/a/any_layout
python pretrain_sgt.py --config a.yaml checkpoint.load=runs/a/any_layout
"""

from __future__ import annotations

import argparse
import time

from megatron_sgt.cli import path, run_main
from megatron_sgt.metrics.units import elapsed, file_size


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--load", type=path, required=True, metavar="CKPT", help="a folder of checkpoints, or one of them"
    )
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="folder of checkpoints to write into")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="write with N processes [%(default)s]")
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    return args


def main() -> None:
    """Convert and say where the result lies."""
    args = parse()
    from megatron_sgt.compat.quiet import quiet_imports

    quiet_imports()
    from megatron_sgt.checkpoint.layout import resolve
    from megatron_sgt.checkpoint.reshard.convert import convert

    start = time.perf_counter()
    final, size, drift = convert(resolve(args.load), args.output, args.processes)
    print(f"{final}: {file_size(size)} in {elapsed(time.perf_counter() - start)}; loads under any layout")
    if drift:
        print(f"tensor-parallel copies of replicated weights differed by up to {drift:.1e}; rank 0's were taken")


if __name__ == "__main__":
    run_main(main)
