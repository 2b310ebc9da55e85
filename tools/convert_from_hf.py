#!/usr/bin/env python
"""Import a Hugging Face folder, so that a run continues its pretraining under any parallel layout.

python tools/convert_from_hf.py --input Llama-3-8B --output runs/llama/import
torchrun --nproc-per-node 8 pretrain_sgt.py --config runs/llama/import/run.yaml data.data_path=data/c4

Llama, Mistral, Qwen2 and Qwen3 (dense), OLMo-2 and OLMo-3, and folders that this project has exported; sequences up
to a sliding window. What does not fit is refused by name. The weights become fp32 masters; one tensor is in memory at a
time.
"""

from __future__ import annotations

import argparse
import re
import time

from megatron_sgt.cli import path, positive, run_main, words
from megatron_sgt.metrics.units import elapsed, file_size

NAME = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=path, required=True, metavar="DIR", help="the Hugging Face folder")
    parser.add_argument(
        "--output", type=path, required=True, metavar="CKPT_ROOT", help="folder of checkpoints to write into"
    )
    parser.add_argument(
        "--config", type=path, metavar="F", help="the run that will continue it [one is written to CKPT_ROOT]"
    )
    parser.add_argument(
        "--seq-length",
        type=positive,
        metavar="N",
        help="tokens per sequence [the model's context, at most 4096]",
    )
    parser.add_argument(
        "--pad-vocabulary-to",
        type=positive,
        metavar="N",
        help="rows of zeros up to a multiple of N, which the tensor-parallel size must divide "
        "[none if 128, 64, 32, 16 or 8 divides the vocabulary, else up to a multiple of 128]",
    )
    parser.add_argument(
        "--base-model",
        type=words,
        metavar="OWNER/NAME",
        help="the hub's name for the model, for the cards of exports [known where the folder is in the hub's cache]",
    )
    args = parser.parse_args()
    if args.config is not None and (args.seq_length or args.pad_vocabulary_to):
        parser.error("--seq-length and --pad-vocabulary-to stand in the file of --config")
    if args.base_model is not None and not NAME.fullmatch(args.base_model):
        parser.error(f"--base-model {args.base_model!r}: must be the hub's name for the model, OWNER/NAME")
    return args


def main() -> None:
    """Import, and say how to go on."""
    args = parse()
    from megatron_sgt.compat.quiet import quiet_imports

    quiet_imports()
    from megatron_sgt.export.from_hf import import_model
    from megatron_sgt.export.tokenizers import begins_texts

    start = time.perf_counter()
    done = import_model(args.input, args.output, args.config, args.seq_length, args.pad_vocabulary_to, args.base_model)
    print(
        f"{done.folder}: {done.model.model_type} with {done.num_parameters:,} parameters "
        f"({', '.join(done.stored_as)}), {file_size(done.num_bytes)} in {elapsed(time.perf_counter() - start)}"
    )
    if done.left_out:
        print(f"left out, as no part of the model: {', '.join(done.left_out)}")
    if done.padding_rows:
        print(
            f"the vocabulary has {done.padding_rows} rows of padding, which take part in the softmax: the loss "
            "begins slightly above the model's own"
        )
    if done.model.window is not None and done.model.window < done.model.max_position_embeddings:
        print(
            f"layers of the model see {done.model.window:,} tokens back, all of a sequence up to that length: "
            f"model.seq_length is {done.config.model.seq_length:,}, and an export names no longer context"
        )
    tokenizer = done.config.data.tokenizer
    if tokenizer is None:
        print("no tokenizer: set data.tokenizer, or train on data of the model's own tokens")
    elif not tokenizer.add_bos and (token := begins_texts(args.input)):
        print(
            f"the tokenizer begins texts with {token}, which the model has probably seen before every document: "
            "tools/preprocess_data.py --add-bos does so, and data.tokenizer.add_bos=true"
        )
    run = args.config or done.config_file
    load = "" if done.config_file else f" checkpoint.load={args.output}"
    data = "" if done.config.data.data_path else " data.data_path=PREFIX"
    print(f"continue it: torchrun --nproc-per-node N pretrain_sgt.py --config {run}{load}{data}")


if __name__ == "__main__":
    run_main(main)
