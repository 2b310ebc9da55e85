#!/usr/bin/env python
"""Write a checkpoint as a Hugging Face folder: from any tensor-parallel, data-parallel and ZeRO layout, on a CPU,
one parameter in memory at a time.

python tools/convert_to_hf.py --load runs/a/checkpoints --output a_hf
python tools/convert_to_hf.py --load runs/a/checkpoints --step 1000 --output a_hf --dtype fp32
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from megatron_sgt.cli import run_main


def size(text: str) -> int:
    """Type of an argparse argument: bytes, as 500MB, 5GB or a plain number."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        value = int(float(number) * unit)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 500MB or 5GB, got {text!r}")
    return value


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="CKPT", help="a folder of checkpoints, or one of them")
    add("--step", type=int, metavar="N", help="which checkpoint of the folder [the latest]")
    add("--output", type=Path, required=True, metavar="DIR", help="folder to write; must not exist")
    add(
        "--dtype",
        choices=("bf16", "fp32", "fp16"),
        default="bf16",
        help="of the stored weights [%(default)s]",
    )
    add("--tokenizer", metavar="PATH", help="instead of the configuration's: a sentencepiece .model, a tokenizer.json, "
        "a folder; 'none' to leave it out")  # fmt: skip
    add("--training-gates", action="store_true", help="inside a decay window: keep the gates of that step, instead of "
        "those of inference (kept heads 1, others 0)")  # fmt: skip
    add(
        "--keep-padding", action="store_true", help="keep the rows that pad the vocabulary [they are cut off]"
    )
    add("--max-shard-size", type=size, default="5GB", metavar="SIZE", help="of one weight file [%(default)s]")
    return parser.parse_args()


def main() -> None:
    """Convert, and say what lies where."""
    args = parse()
    from megatron_sgt.compat.quiet import quiet_imports

    quiet_imports()
    from megatron_sgt.config.data import TokenizerConfig
    from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint

    tokenizer = None
    if args.tokenizer not in (None, "none"):
        tokenizer = TokenizerConfig(
            type="sentencepiece" if args.tokenizer.endswith(".model") else "huggingface", model=args.tokenizer
        )
    options = ExportOptions(
        dtype=args.dtype,
        training_gates=args.training_gates,
        keep_padding=args.keep_padding,
        tokenizer=tokenizer,
        write_tokenizer=args.tokenizer != "none",
        max_shard_bytes=args.max_shard_size,
    )
    start = time.perf_counter()
    export = export_checkpoint(args.load, args.output, step=args.step, options=options)
    print(f"EXPORT  {export.source.folder} -> {export.folder}: {export.weight_bytes / 1e6:,.1f} MB of {args.dtype} "
          f"weights in {time.perf_counter() - start:.1f} s")  # fmt: skip
    print(f"MODEL   {export.architecture}: {export.why}")
    if export.drift:
        print(f"NOTE    tensor-parallel copies of replicated weights differed by up to {export.drift:.1e}; rank 0's "
              "were taken")  # fmt: skip


if __name__ == "__main__":
    run_main(main)
