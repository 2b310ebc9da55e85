#!/usr/bin/env python
"""Write a jsonl corpus of real text that every machine has: the sources of Python's standard library."""

import argparse

from megatron_sgt.cli import output, positive, run_main
from megatron_sgt.data.corpus import MIN_BYTES, build_corpus
from megatron_sgt.metrics.units import file_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=output, required=True, metavar="FILE.jsonl", help="file to write")
    parser.add_argument(
        "--min-bytes",
        type=positive,
        metavar="N",
        default=MIN_BYTES,
        help="include the library's tests if the rest is smaller [%(default)s]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    args = parser.parse_args()
    report = build_corpus(args.output, args.min_bytes, args.overwrite)
    with_tests = ", its test suite included" if report.with_tests else ""
    print(f"{report.path}: {report.documents:,} documents, {file_size(report.text_bytes)} of text{with_tests}")
    if report.left_out:
        print(
            f"left out: {report.left_out} source files that cannot be read, or are no text in the coding they declare"
        )


if __name__ == "__main__":
    run_main(main)
