#!/usr/bin/env python
"""Time of attention that stays inside documents against causal attention, forward and backward, on a CPU.

python tools/bench/document_attention.py                             # documents of 512 in 4096 positions, and others
python tools/bench/document_attention.py --length 8192 --heads 4

Each way is measured in alternation with the causal call; a ratio is the median over the pairs. ``pairs`` is the share
of the causal pairs of query and key that are left.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from megatron_sgt.cli import positive, run_main
from megatron_sgt.ops.attention import causal_attention
from megatron_sgt.ops.documents import Documents


def parse() -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("length", 4096, "positions of a sequence"),
        ("document", 512, "tokens of a document, where all are alike"),
        ("batch", 1, "sequences"),
        ("heads", 2, "heads"),
        ("head-size", 64, "size of a head"),
        ("repeats", 9, "measured pairs"),
        ("threads", 1, "CPU threads"),
    ):
        parser.add_argument(
            f"--{name}", type=positive, default=default, metavar="N", help=f"{text} (default {default})"
        )
    return parser.parse_args()


def layouts(length: int, document: int) -> dict[str, list[int]]:
    """Lengths of the documents of a sequence."""
    uneven = [n for n in (length // 3, length // 5, 1, length // 7, length // 11, length // 50) if n]
    return {
        f"documents of {document}": _filled([document] * (length // document), length),
        "uneven documents": _filled(uneven, length),
        "documents of 37": _filled([37] * (length // 37), length),
        "one document": [length],
        "one document, 1 token of padding": _filled([length - 1], length),
    }


def _filled(lengths: list[int], total: int) -> list[int]:
    rest = total - sum(lengths)
    return [*lengths, rest] if rest else lengths


def documents_of(lengths: list[int], batch: int) -> Documents:
    """The same documents in each sequence; one document is left one, so that it goes the same way."""
    first = torch.tensor([0, *itertools.accumulate(lengths)])[:-1]
    starts = first.repeat_interleave(torch.tensor(lengths)).int().expand(batch, -1)
    # Padding, which nothing here looks at, keeps ``of`` from answering that no documents are needed.
    documents = Documents.of(starts, torch.full((batch,), sum(lengths) - 1))
    if documents is None:
        raise AssertionError("a sequence with padding has documents")
    return documents


def seconds(inputs: list[torch.Tensor], pull: torch.Tensor, documents: Documents | None) -> float:
    """One forward and backward pass."""
    start = time.perf_counter()
    query, key, value = inputs
    out = causal_attention(query, key, value, documents=documents)
    torch.autograd.grad(out, inputs, pull)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = (args.length, args.batch, args.heads, args.head_size)
    inputs = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    pull = torch.randn(shape)
    causal = args.batch * args.length * (args.length + 1) // 2
    for name, lengths in layouts(args.length, args.document).items():
        documents = documents_of(lengths, args.batch)
        seconds(inputs, pull, None), seconds(inputs, pull, documents)
        pairs = [(seconds(inputs, pull, None), seconds(inputs, pull, documents)) for _ in range(args.repeats)]
        ratio = statistics.median(found / plain for plain, found in pairs)
        milliseconds = 1000 * statistics.median(found for _, found in pairs)
        print(f"{name:34} {milliseconds:9.2f} ms  {ratio:6.3f} x causal  pairs {documents.pairs / causal:6.3f}")


if __name__ == "__main__":
    run_main(main)
