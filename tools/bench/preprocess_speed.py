#!/usr/bin/env python
"""Tokens per second of tools/preprocess_data.py beside those of what Megatron-LM's own script does.

Megatron-LM's tools/preprocess_data.py is in no wheel. What it does by its documentation is done here: a
``multiprocessing.Pool`` of so many workers maps lines, 32 at a time, to lists of ids (``json.loads``, the ids of the
text, the end-of-text token), and the parent hands each document to Megatron-Core's ``IndexedDatasetBuilder``. Both run
as processes of their own, in turn, on the same file with the same tokenizer, their starts included; both data sets must
have the same bytes.
"""

import argparse
import json
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megatron_sgt.cli import path, path_text, positive, run_main
from megatron_sgt.data.indexed import check_indexed_dataset
from megatron_sgt.errors import SGTError

ROOT = Path(__file__).resolve().parents[2]
LINES_PER_TASK = 32


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=path, required=True, metavar="FILE", help="jsonl with texts under 'text'")
    parser.add_argument(
        "--tokenizer-model", type=path_text, required=True, metavar="FILE", help="of sentencepiece, or tokenizer.json"
    )
    parser.add_argument("--workers", type=positive, nargs="+", default=[1, 2], metavar="N", help="[1 2]")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="alternating pairs [%(default)s]")
    parser.add_argument("--as-megatron", type=path_text, metavar="PREFIX", help=argparse.SUPPRESS)
    return parser.parse_args()


_encode: Any = None
_eod = 0


def _start_worker(model: str) -> None:
    """Load the tokenizer through its own library."""
    global _encode, _eod
    if model.endswith(".json"):
        import tokenizers

        tokenizer = tokenizers.Tokenizer.from_file(model)
        _encode, _eod = lambda text: tokenizer.encode(text, add_special_tokens=False).ids, 0
    else:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=model)
        _encode, _eod = processor.encode_as_ids, processor.eos_id()


def _ids_of(line: str) -> tuple[dict[str, list[int]], dict[str, list[int]], int]:
    """Ids and lengths of the sentences of a line, by key, and its own length."""
    ids = _encode(json.loads(line)["text"])
    if ids:
        ids.append(_eod)
    return {"text": ids}, {"text": [len(ids)] if ids else []}, len(line)


def as_megatron(source: Path, model: str, workers: int, prefix: str) -> None:
    """Write ``source`` as Megatron-LM's script does."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    _start_worker(model)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", DType.optimal_dtype(_vocab_size(model)))
    with source.open(encoding="utf-8") as stream, multiprocessing.Pool(workers, _start_worker, (model,)) as pool:
        for ids, lengths, _ in pool.imap(_ids_of, stream, LINES_PER_TASK):
            if lengths["text"]:
                builder.add_document(ids["text"], lengths["text"])
        builder.finalize(f"{prefix}.idx")


def _vocab_size(model: str) -> int:
    if model.endswith(".json"):
        import tokenizers

        return int(tokenizers.Tokenizer.from_file(model).get_vocab_size())
    import sentencepiece

    return int(sentencepiece.SentencePieceProcessor(model_file=model).get_piece_size())


def measure(args: argparse.Namespace, workers: int, folder: Path) -> None:
    """Print the rates of both with so many workers, and what of their seconds is the start."""
    prefixes = {"ours": folder / "ours_text_document", "as Megatron": folder / "megatron"}
    first = folder / "first.jsonl"
    with args.input.open(encoding="utf-8") as stream:
        first.write_text(stream.readline(), encoding="utf-8")
    starts = {name: _run(name, first, args.tokenizer_model, workers, folder)[1] for name in prefixes}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in prefixes}
    for _ in range(args.rounds):
        for name in prefixes:
            found[name].append(_run(name, args.input, args.tokenizer_model, workers, folder))
    for suffix in (".bin", ".idx"):
        ours, theirs = (Path(f"{prefix}{suffix}").read_bytes() for prefix in prefixes.values())
        if ours != theirs:
            raise SGTError(f"the two {suffix} files differ; the comparison says nothing")
    tokens = check_indexed_dataset(str(prefixes["ours"])).tokens
    for name, times in found.items():
        seconds, cores = (statistics.median(values) for values in zip(*times, strict=True))
        print(
            f"{workers} worker(s)  {name:11} {seconds:6.1f} s, {tokens / seconds:9,.0f} tokens/s; "
            f"{cores:6.1f} s of cores, {starts[name]:.1f} of them the start",
            flush=True,
        )
    pairs = [(b[0] / a[0], b[1] / a[1]) for a, b in zip(*found.values(), strict=True)]
    clock, cores = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(
        f"{workers} worker(s)  ours is {clock:.2f} times as fast, by cores {cores:.2f}: median of {args.rounds} pairs"
    )


def _run(name: str, source: Path, model: str, workers: int, folder: Path) -> tuple[float, float]:
    """Seconds of the clock, and of cores."""
    command = [str(ROOT / "tools/preprocess_data.py"), "--append-eod", "--overwrite", "--output-prefix"]
    command += [str(folder / "ours"), *(["--tokenizer-type", "huggingface"] if model.endswith(".json") else [])]
    if name != "ours":
        command = [__file__, "--as-megatron", str(folder / "megatron")]
    command += ["--input", str(source), "--tokenizer-model", model, "--workers", str(workers)]
    start, before = time.monotonic(), _core_seconds()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise SGTError(f"{' '.join(command)}: {done.stderr.strip()}")
    return time.monotonic() - start, _core_seconds() - before


def _core_seconds() -> float:
    """Of all processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    args = parse_arguments()
    if args.as_megatron:
        as_megatron(args.input, args.tokenizer_model, args.workers[0], args.as_megatron)
        return
    with tempfile.TemporaryDirectory(dir=args.input.parent) as folder:
        for workers in args.workers:
            measure(args, workers, Path(folder))


if __name__ == "__main__":
    run_main(main)
