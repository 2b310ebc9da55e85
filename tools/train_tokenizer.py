#!/usr/bin/env python
"""Train a sentencepiece tokenizer that reproduces every text exactly."""

import argparse

from megatron_sgt.cli import output, path_text, positive, run_main, seed, words, zero_or_more
from megatron_sgt.data.inputs import BAD_HELP, INPUT_HELP
from megatron_sgt.data.train_tokenizer import FIXED_IDS, SAMPLE_BYTES, train_tokenizer
from megatron_sgt.metrics.units import file_size


def main() -> None:
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
    parser.add_argument("--output", type=output, required=True, metavar="FILE.model", help="file to write")
    parser.add_argument(
        "--vocab-size",
        type=positive,
        required=True,
        metavar="N",
        help=f"number of ids, the {FIXED_IDS} fixed ones included",
    )
    parser.add_argument("--model-type", choices=("bpe", "unigram"), default="bpe", help="[%(default)s]")
    parser.add_argument("--json-key", type=words, default="text", help="key or column of the text [%(default)s]")
    parser.add_argument(
        "--input-format", choices=("jsonl", "text", "parquet"), help="format of all inputs [by their suffix]"
    )
    parser.add_argument(
        "--sample-bytes",
        type=positive,
        metavar="N",
        default=SAMPLE_BYTES,
        help="bytes of text to train on [%(default)s]",
    )
    parser.add_argument("--max-bad-documents", type=zero_or_more, metavar="N", default=0, help=BAD_HELP)
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the sample [%(default)s]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    if args.vocab_size <= FIXED_IDS:
        parser.error(
            f"argument --vocab-size: {args.vocab_size} leaves no room beside the {FIXED_IDS} fixed ids "
            "(3 special tokens, 256 bytes)"
        )
    report = train_tokenizer(
        args.input,
        args.output,
        args.vocab_size,
        model_type=args.model_type,
        json_key=args.json_key,
        input_format=args.input_format,
        sample_bytes=args.sample_bytes,
        seed=args.seed,
        overwrite=args.overwrite,
        max_bad_documents=args.max_bad_documents,
    )
    if report.bad:
        print(report.bad)
    print(
        f"{report.path}: {report.vocab_size:,} ids, trained on {report.documents:,} documents "
        f"({file_size(report.text_bytes)}), {report.bytes_per_token:.2f} bytes per token"
    )


if __name__ == "__main__":
    run_main(main)
