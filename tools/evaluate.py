#!/usr/bin/env python
"""Measure a checkpoint or an exported folder: loss on an indexed data set, tasks of lm-evaluation-harness.

python tools/evaluate.py runs/a/checkpoints                              on what the run validates on
python tools/evaluate.py runs/a/checkpoints --valid-set wiki             on a set of its data.valid
python tools/evaluate.py a_hf --data data/wiki_text_document             on all of a data set
python tools/evaluate.py a_hf --tasks hellaswag,arc_easy --limit 100     needs pip install megatron-sgt[eval]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from megatron_sgt.cli import path, path_text, positive, run_main, words
from megatron_sgt.errors import ConfigError


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=path, metavar="CKPT_OR_DIR", help="a folder of checkpoints, one of them, or an export")
    add("--step", type=int, metavar="N", help="which checkpoint of the folder [the latest]")
    add("--data", type=path_text, nargs="+", action="extend", default=[], metavar="PREFIX", help="an indexed data set "
        "or a blend: weight prefix ... [a checkpoint: that of its run]")  # fmt: skip
    add("--part", choices=("train", "valid", "test", "all"), help="split to read [of --data all; else valid]")
    add("--valid-set", type=words, metavar="NAME", help="a set of data.valid of the checkpoint's run, as it validates")
    add("--split", type=words, metavar="A,B,C", help="shares of the splits [a checkpoint: those of its run]")
    add("--seq-length", type=positive, metavar="N", help="tokens per sample [the model's context]")
    add(
        "--samples",
        type=positive,
        metavar="N",
        help="the first N samples [those that the run validates on, else all]",
    )
    add("--tasks", type=words, metavar="A,B", help="tasks of lm-evaluation-harness, by name")
    add("--include-path", type=path, metavar="DIR", help="folder of further task definitions")
    add("--num-fewshot", type=int, metavar="N", help="examples before every question [the task's]")
    add("--limit", type=positive, metavar="N", help="questions of every task [all]")
    add("--batch-size", type=positive, default=4, metavar="N", help="sequences at a time [%(default)s]")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the weights [auto: bf16 on a "
        "GPU, fp32 on a CPU]")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[%(default)s]")
    add("--tokenizer", type=path, metavar="PATH", help="instead of the model's own")
    add("--trust-remote-code", action="store_true", help="run the model code that a folder brings; without it an SGT "
        "folder is read by this package's own")  # fmt: skip
    add("--json", action="store_true", help="print everything as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse()
    from megatron_sgt.compat.quiet import quiet_imports

    if args.valid_set and (args.data or args.part or args.split):
        raise ConfigError("--valid-set names the data and its part; leave --data, --part and --split out")
    quiet_imports()
    from megatron_sgt.config.run import resolve_precision
    from megatron_sgt.evaluation.downstream import require_harness, run_tasks
    from megatron_sgt.export.evaluate import evaluate, which_of_set, which_samples
    from megatron_sgt.export.hf.open_model import open_model
    from megatron_sgt.parallel.device import select_device

    if args.tasks is not None:
        require_harness()
    device = select_device(args.device, 0)
    opened = open_model(
        args.model,
        step=args.step,
        dtype=resolve_precision(args.dtype, device.type),
        device=device,
        tokenizer=args.tokenizer,
        keep_padding=args.tasks is None,
        trust_remote_code=args.trust_remote_code,
    )
    report: dict[str, Any] = {"model": opened.name, "dtype": str(opened.model.dtype).removeprefix("torch.")}
    if args.data or args.valid_set or args.tasks is None:
        if args.valid_set:
            wanted = which_of_set(opened, args.valid_set, args.seq_length, args.samples)
        else:
            wanted = which_samples(opened, tuple(args.data), args.split, args.part, args.seq_length, args.samples)
        found = evaluate(opened, wanted, args.tokenizer, args.batch_size)
        report["data"] = {
            "data_path": list(wanted.data.data_path or wanted.data.valid.values()),
            "part": wanted.part,
            "samples": found.samples,
            "tokens": found.tokens,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "loss_with_padding": found.padded_loss,
        }
    if args.tasks is not None:
        names = [name for name in args.tasks.split(",") if name]
        report["tasks"] = run_tasks(
            opened.model,
            opened.tokenizer,
            names,
            args.include_path,
            args.num_fewshot,
            args.limit,
            args.batch_size,
        )
    print(json.dumps(report, indent=1) if args.json else "\n".join(lines(report)))


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report as text."""
    yield f"{report['model']} ({report['dtype']})"
    if data := report.get("data"):
        yield f"  data        {' '.join(data['data_path'])} ({data['part']})"
        yield f"  tokens      {data['tokens']:,} in {data['samples']:,} samples"
        yield f"  loss        {data['loss']:.6f} nats per token"
        yield f"  perplexity  {data['perplexity']:,.4f}"
        if data["bits_per_byte"] is not None:
            yield f"  bits/byte   {data['bits_per_byte']:.4f}"
        if data["loss_with_padding"] is not None:
            yield f"  with the padding rows of the vocabulary, as in training: loss {data['loss_with_padding']:.6f}"
    for task, values in report.get("tasks", {}).items():
        yield f"  {task}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items())


if __name__ == "__main__":
    run_main(main)
