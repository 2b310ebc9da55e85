#!/usr/bin/env python
"""Write a checkpoint as a Hugging Face folder, from any parallel layout, on a CPU.

One parameter is in memory at a time. Then the folder is loaded with transformers and compared with the project's own
model; the result is parity.json in it.

python tools/convert_to_hf.py --load runs/a/checkpoints --output a_hf
python tools/convert_to_hf.py --load runs/a/checkpoints --step 1000 --output a_hf --dtype fp32
python tools/convert_to_hf.py --load runs/a/checkpoints --output a_ema_hf --weights ema

Exit code 1 when the two are not the same model: the folder is then called DIR.failed.
"""

from __future__ import annotations

import argparse
import re
import time

from megatron_sgt.cli import path, path_text, run_main, words
from megatron_sgt.export.forms import FORMS, STANDARD
from megatron_sgt.metrics.units import elapsed, file_size

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def number_of_bytes(text: str) -> int:
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--load", type=path, required=True, metavar="CKPT", help="a folder of checkpoints, or one of them")
    add("--step", type=int, metavar="N", help="which checkpoint of the folder [the latest]")
    add("--output", type=path, required=True, metavar="DIR", help="folder to write; must not exist")
    add(
        "--dtype",
        choices=("bf16", "fp32", "fp16"),
        default="bf16",
        help="of the stored weights [%(default)s]",
    )
    add("--for", dest="form", choices=tuple(FORMS), default=STANDARD.name, help="where it will run: transformers' own "
        "generation and training, or a server; one that is plain is the same in both [%(default)s]")  # fmt: skip
    add("--weights", choices=("trained", "ema"), default="trained", help="the trained ones, or their moving average "
        "(train.ema_decay) [%(default)s]")  # fmt: skip
    add("--tokenizer", type=path_text, metavar="PATH", help="instead of the configuration's: a sentencepiece .model, "
        "a tokenizer.json, a folder; 'none' to leave it out")  # fmt: skip
    add("--chat-template", type=path_text, default="none", metavar="none|keep|PATH", help="the tokenizer's own chat "
        "template, or a Jinja file; special tokens in a text then are read as such [%(default)s]")  # fmt: skip
    add("--training-gates", action="store_true", help="inside a decay window: keep the gates of that step, instead of "
        "those of inference (kept heads 1, others 0)")  # fmt: skip
    add("--keep-padding", action="store_true", help="keep the rows that pad the vocabulary [they are cut off]")
    add(
        "--max-shard-size",
        type=number_of_bytes,
        default="5GB",
        metavar="SIZE",
        help="of one weight file [%(default)s]",
    )
    add("--license", type=words, metavar="ID", help="licence of the weights for the card, as hubs name it: apache-2.0, "
        "mit, other, ... [the card says that none was named]")  # fmt: skip
    parity = parser.add_mutually_exclusive_group()
    parity.add_argument("--skip-parity", action="store_true", help="do not compare")
    parity.add_argument("--parity-layers", action="store_true", help="compare with one layer of each model in memory, "
        "instead of both whole models in fp32; without the greedy continuation")  # fmt: skip
    args = parser.parse_args()
    if args.license is not None and not LICENSE.fullmatch(args.license):
        parser.error(
            f"--license {args.license!r}: must be an identifier as hubs have them, such as apache-2.0 or other"
        )
    return args


def main() -> int:
    """Convert, compare, and say where things are; returns the exit code."""
    args = parse()
    from megatron_sgt.compat.quiet import quiet_imports

    quiet_imports()
    from megatron_sgt.config.data import TokenizerConfig
    from megatron_sgt.export.checked import Mode, checked_export, failed_name
    from megatron_sgt.export.to_hf import ExportOptions

    tokenizer = None if args.tokenizer in (None, "none") else TokenizerConfig.at(args.tokenizer)
    options = ExportOptions(
        dtype=args.dtype,
        form=FORMS[args.form],
        averaged=args.weights == "ema",
        training_gates=args.training_gates,
        keep_padding=args.keep_padding,
        tokenizer=tokenizer,
        write_tokenizer=args.tokenizer != "none",
        chat_template=args.chat_template,
        max_shard_bytes=args.max_shard_size,
        license=args.license,
    )
    mode: Mode = "skip" if args.skip_parity else "layers" if args.parity_layers else "full"
    start = time.perf_counter()
    export, parity = checked_export(args.load, args.output, step=args.step, options=options, mode=mode)
    size = file_size(export.weight_bytes)
    kind = "averaged weights" if export.options.averaged else "weights"
    print(f"EXPORT  {export.source.folder} -> {export.folder}: {size} of {args.dtype} {kind}")
    same = "" if export.form else "; the same for every --for"
    print(f"MODEL   {export.architecture}: {export.why}{same}")
    if export.drift:
        print(f"NOTE    tensor-parallel copies of replicated weights differed by up to {export.drift:.1e}; rank 0's "
              "were taken")  # fmt: skip
    for note in export.tokenizer_notes:
        print(f"NOTE    {note}")
    for check in () if parity is None else parity.checks:
        print(f"PARITY  {check.line()}")
    seconds = elapsed(time.perf_counter() - start)
    if parity is not None and not parity.passed:
        print(f"FAILED  the folder is not the same model: {failed_name(export.folder)} ({seconds})")
        return 1
    print(f"DONE    {'not compared' if parity is None else 'the same model'} ({seconds})")
    return 0


if __name__ == "__main__":
    run_main(main)
