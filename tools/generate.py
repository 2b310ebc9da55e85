#!/usr/bin/env python
"""Continue texts with a checkpoint or an exported folder; both give the same text.

python tools/generate.py runs/a/checkpoints --prompt "def main():" --max-new-tokens 50
python tools/generate.py a_hf --prompt-file prompts.txt --temperature 0.8 --top-p 0.95 --num-samples 3 --jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from megatron_sgt.cli import number, path, positive, run_main, seed, words
from megatron_sgt.data.prompts import read_prompts
from megatron_sgt.streams import is_utf8


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", type=path, metavar="CKPT_OR_DIR", help="a folder of checkpoints, one of them, or an export")
    add("--step", type=int, metavar="N", help="which checkpoint of the folder [the latest]")
    add("--prompt", type=words, action="append", default=[], metavar="TEXT", help="may be given several times")
    add("--prompt-file", type=path, action="append", default=[], metavar="FILE", help="one prompt per line; may be "
        "compressed, and given several times")  # fmt: skip
    add("--max-new-tokens", type=positive, default=64, metavar="N", help="[%(default)s]")
    add("--greedy", action="store_true", help="always the most likely token, as --temperature 0")
    add("--temperature", type=number, default=1.0, metavar="T", help="[%(default)s]")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K most likely tokens [0: all]")
    add("--top-p", type=number, default=1.0, metavar="P", help="sample from the most likely tokens that have "
        "probability P together [%(default)s]")  # fmt: skip
    add("--num-samples", type=positive, default=1, metavar="N", help="of every prompt [%(default)s]")
    add("--seed", type=seed, default=0, metavar="N", help="of the samples [%(default)s]")
    add("--batch-size", type=positive, default=8, metavar="N", help="prompts at a time [%(default)s]")
    add("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the weights [auto: bf16 on a "
        "GPU, fp32 on a CPU]")  # fmt: skip
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="[%(default)s]")
    add("--tokenizer", type=path, metavar="PATH", help="instead of the model's own")
    add("--trust-remote-code", action="store_true", help="run the model code that a folder brings; without it an SGT "
        "folder is read by this package's own")  # fmt: skip
    add("--jsonl", action="store_true", help="print one JSON object per sample")
    return parser.parse_args()


def main() -> None:
    """Generate and print."""
    args = parse()
    prompts = [*args.prompt, *(prompt for file in args.prompt_file for prompt in read_prompts(file))]
    from megatron_sgt.compat.quiet import quiet_imports

    quiet_imports()
    from megatron_sgt.config.run import resolve_precision
    from megatron_sgt.export.hf.generate import Sampling, check_prompts, generate
    from megatron_sgt.export.hf.open_model import open_model
    from megatron_sgt.parallel.device import select_device

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=0.0 if args.greedy else args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        num_samples=args.num_samples,
        seed=args.seed,
    )
    sampling.check()
    check_prompts(prompts)  # before the weights are read
    device = select_device(args.device, 0)
    opened = open_model(
        args.model,
        step=args.step,
        dtype=resolve_precision(args.dtype, device.type),
        device=device,
        tokenizer=args.tokenizer,
        trust_remote_code=args.trust_remote_code,
    )
    for sample in generate(opened, prompts, sampling, args.batch_size):
        if args.jsonl:
            print(json.dumps(asdict(sample), ensure_ascii=not is_utf8(sys.stdout)), flush=True)
        else:
            print(f"{sample.prompt}{sample.text}{'' if sample.ended else ' …'}\n", flush=True)


if __name__ == "__main__":
    run_main(main)
