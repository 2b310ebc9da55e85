#!/usr/bin/env python
"""Tokenize text into Megatron's indexed data sets, PREFIX_<key>_document.bin/.idx, for pretrain_sgt.py.

A run that is killed, at any moment, goes on with --resume and ends with the same bytes. Several jobs share one input
with --shard; tools/merge_data.py joins what they write. Documents are not deduplicated: use a tool for that before.
"""

import argparse

from megatron_sgt.cli import output, path_text, run_main, shard, words, zero_or_more
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.inputs import BAD_HELP, INPUT_HELP
from megatron_sgt.data.preprocess import PreprocessOptions, default_workers, describe, preprocess
from megatron_sgt.data.shards import Shard


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--input",
        type=path_text,
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help=INPUT_HELP,
    )
    parser.add_argument(
        "--output-prefix",
        type=output,
        required=True,
        metavar="PREFIX",
        help="beginning of the files to write",
    )
    parser.add_argument(
        "--tokenizer-type",
        choices=("sentencepiece", "huggingface"),
        default="sentencepiece",
        help="[%(default)s]",
    )
    parser.add_argument(
        "--tokenizer-model",
        type=path_text,
        required=True,
        metavar="PATH",
        help=".model file; tokenizer.json or its folder",
    )
    parser.add_argument(
        "--json-keys",
        type=words,
        nargs="+",
        action="extend",
        metavar="KEY",
        help="keys or columns, one data set each [text]",
    )
    parser.add_argument(
        "--input-format", choices=("jsonl", "text", "parquet"), help="format of all inputs [by their suffix]"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=default_workers(),
        help="processes [the CPU cores: %(default)s]",
    )
    parser.add_argument("--max-bad-documents", type=zero_or_more, metavar="N", default=0, help=BAD_HELP)
    parser.add_argument("--add-bos", action="store_true", help="begin every document with the beginning-of-text token")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-text token")
    _add_parts(parser)
    parser.add_argument("--checksum", action="store_true", help="print the sha256 of the .bin")
    args = parser.parse_args()
    if args.workers < 1:
        parser.error(f"--workers must be at least 1, got {args.workers}")
    if not args.tokenizer_model:
        parser.error("--tokenizer-model is empty")
    return args


def _add_parts(parser: argparse.ArgumentParser) -> None:
    """Arguments of runs that share the input, or go on."""
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="i/n",
        help="read only part i, from 0, of n: equal numbers of bytes, lines and rows whole, and write "
        "PREFIX-0000i-of-0000n_<key>_document [all]",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace an existing data set")
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on where a killed run was, keep what is finished; other inputs or settings are refused [begin anew, "
        "over what a killed run has left]",
    )


def main() -> None:
    args = parse_arguments()
    options = PreprocessOptions(
        inputs=tuple(args.input),
        output_prefix=args.output_prefix,
        tokenizer=TokenizerConfig(type=args.tokenizer_type, model=args.tokenizer_model, add_bos=args.add_bos),
        json_keys=tuple(args.json_keys or ("text",)),
        input_format=args.input_format,
        num_workers=args.workers,
        append_eod=args.append_eod,
        overwrite=args.overwrite,
        max_bad_documents=args.max_bad_documents,
        resume=args.resume,
        shard=Shard(*args.shard) if args.shard else None,
    )
    for line in describe(preprocess(options), options, args.checksum):
        print(line)


if __name__ == "__main__":
    run_main(main)
