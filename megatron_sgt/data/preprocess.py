"""Text files to Megatron's indexed data sets: PREFIX_<key>_document.bin and .idx."""

import contextlib
import fcntl
import json
import os
import time
import warnings
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.documents import BadDocuments
from megatron_sgt.data.encoding import EncodedKey, encode_chunks
from megatron_sgt.data.export_form import export_form
from megatron_sgt.data.inputs import Kind, find_inputs
from megatron_sgt.data.progress import Progress, note
from megatron_sgt.data.readers import read_chunks
from megatron_sgt.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sgt.errors import DataError
from megatron_sgt.files import commit, sha256_of, sync, temporary_of
from megatron_sgt.metrics.units import elapsed

UINT16_BELOW = 65500
"""Megatron's rule (indexed_dataset.DType.optimal_dtype): smaller vocabularies are stored in 16 bits."""


@dataclass(frozen=True)
class PreprocessOptions:
    """What to read and how to write it."""

    inputs: tuple[str, ...]
    output_prefix: str
    tokenizer: TokenizerConfig
    json_keys: tuple[str, ...] = ("text",)
    input_format: Kind | None = None
    """None: by the suffix."""
    num_workers: int = 1
    append_eod: bool = False
    overwrite: bool = False
    max_bad_documents: int = 0
    """So many are left out and counted; one more is an error."""


@dataclass(frozen=True)
class WrittenDataset:
    """One data set that was written."""

    prefix: str
    documents: int
    tokens: int
    empty: int
    """Documents without any token, left out."""


@dataclass(frozen=True)
class PreprocessReport:
    """What a run of ``preprocess`` did."""

    datasets: tuple[WrittenDataset, ...]
    """One per key."""
    repaired: int
    """Texts with invalid Unicode, repaired."""
    bad: str | None
    """What to say of bad documents, if there were any."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return sum(dataset.tokens for dataset in self.datasets) / max(self.seconds, 1e-9)


def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Tokenize all documents, one data set per key; the result does not depend on the number of workers.

    Files are renamed into place when they are complete. Memory: a few chunks of about a megabyte per worker, and about
    50 bytes per document for the index.

    Raises:
        DataError: unreadable input, more bad documents than ``max_bad_documents`` (the first with file and line),
            output that exists (without ``overwrite``), no document with a token at all.
    """
    _check_keys(options.json_keys)
    found = find_inputs(options.inputs, options.input_format)
    for line in found.notes:
        note(line)
    bad = BadDocuments(options.max_bad_documents)
    tokenizer = build_tokenizer(options.tokenizer)
    if exported := export_form(options.tokenizer).line:
        note(exported)
    _check_boundaries(tokenizer, options)
    dtype = "uint16" if tokenizer.vocab_size < UINT16_BELOW else "int32"
    total_bytes = sum(file.size for file in found.files)
    repaired = 0
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(DatasetWriter(f"{options.output_prefix}_{key}_document", dtype, options.overwrite))
            for key in options.json_keys
        ]
        start = time.monotonic()
        progress = stack.enter_context(Progress("tokenizing", total_bytes))
        encoded_chunks = stack.enter_context(
            contextlib.closing(
                encode_chunks(
                    read_chunks(found.files, options.json_keys, say=note),
                    options.tokenizer,
                    options.json_keys,
                    options.append_eod,
                    dtype,
                    options.num_workers,
                )
            )
        )
        for chunk in encoded_chunks:
            bad.add(chunk.num_bad, chunk.first_bad)
            for writer, encoded in zip(writers, chunk.keys, strict=True):
                writer.add(encoded)
            repaired += chunk.num_repaired
            progress.update(chunk.bytes_read, writers[0].documents, sum(writer.tokens for writer in writers))
        others = writers[0].documents + writers[0].empty
        for writer in writers:
            writer.commit(_metadata(tokenizer, options) | _bad_metadata(bad, others))
    datasets = tuple(WrittenDataset(w.prefix, w.documents, w.tokens, w.empty) for w in writers)
    return PreprocessReport(datasets, repaired, bad.line(others), time.monotonic() - start)


class DatasetWriter:
    """Writes one .bin/.idx pair (and its .json) under temporary names; ``commit`` renames them.

    A context manager: without a commit, what was written is removed.

    Raises:
        DataError: the data set exists and may not be overwritten, or another process is writing it.
    """

    def __init__(self, prefix: str, dtype: str, overwrite: bool) -> None:
        existing = [prefix + suffix for suffix in (".bin", ".idx") if Path(prefix + suffix).exists()]
        if existing and not overwrite:
            raise DataError(f"{' and '.join(existing)} exists already; choose another prefix or give --overwrite")
        self.prefix = prefix
        self.documents = 0
        self.tokens = 0
        self.empty = 0
        self._partial = {suffix: str(temporary_of(Path(prefix + suffix))) for suffix in (".bin", ".json", ".idx")}
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._partial[".bin"])
        except OSError as error:
            raise DataError(f"cannot write {self._partial['.bin']}: {error.strerror}") from error
        self._builder = _make_builder(self._partial[".bin"], dtype)

    def add(self, encoded: EncodedKey) -> None:
        end = 0
        for length in encoded.lengths.tolist():
            start, end = end, end + length
            self._builder.add_document(encoded.tokens[start:end], [length])
        self.documents += len(encoded.lengths)
        self.tokens += end
        self.empty += encoded.num_empty

    def commit(self, metadata: dict[str, Any]) -> None:
        """Make the data set readable.

        Raises:
            DataError: it holds no document.
        """
        if self.documents == 0:
            raise DataError(f"nothing to write to {self.prefix}.bin: the input has no document with text in it")
        self._builder.finalize(self._partial[".idx"])
        record = {"documents": self.documents, "tokens": self.tokens, **metadata}
        Path(self._partial[".json"]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for path in self._partial.values():
            sync(Path(path))
        # The index goes first and comes last: without it the other files are not a data set.
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        for suffix, path in self._partial.items():
            commit(Path(path), Path(self.prefix + suffix))

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._builder.data_file.close()
        for path in self._partial.values():
            Path(path).unlink(missing_ok=True)
        os.close(self._lock)


def _lock(path: str) -> int:
    """Lock ``path`` while this process lives: two jobs must not write one file. Returns a descriptor."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise DataError(f"another process is writing {path}; wait for it or choose another prefix") from error
    except OSError:
        pass  # a file system without locks
    return descriptor


def _make_builder(path: str, dtype: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron.core reports every optional package that is absent
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    builder = IndexedDatasetBuilder(path, np.dtype(dtype).type)
    # Lists of Python integers cost 36 bytes a document and there are hundreds of millions of them.
    builder.sequence_lengths = array("i")
    builder.document_indices = array("q", [0])
    return builder


def _metadata(tokenizer: Tokenizer, options: PreprocessOptions) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "tokenizer_ids": tokenizer.digest_of_ids(),
        "vocab_size": tokenizer.vocab_size,
        "append_eod": options.append_eod,
        "add_bos": options.tokenizer.add_bos,
    }


def _bad_metadata(bad: BadDocuments, others: int) -> dict[str, Any]:
    first = {"bad_share": bad.share(others), "first_bad_document": str(bad.first)} if bad.count else {}
    return {"bad_documents": bad.count, **first}


def _check_boundaries(tokenizer: Tokenizer, options: PreprocessOptions) -> None:
    """Refuse, with DataError, a token between documents that the tokenizer lacks: before workers do."""
    _ = options.tokenizer.add_bos and tokenizer.bos
    _ = options.append_eod and tokenizer.eod


def _check_keys(keys: Sequence[str]) -> None:
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    if repeated:
        raise DataError(f"--json-keys names {repeated[0]!r} more than once; each key makes one data set")


def default_workers() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe(report: PreprocessReport, options: PreprocessOptions, checksum: bool) -> Sequence[str]:
    """The report as lines for a person."""
    lines = []
    for dataset in report.datasets:
        skipped = f", {dataset.empty:,} empty ones skipped" if dataset.empty else ""
        lines.append(f"{dataset.prefix}.bin/.idx: {dataset.documents:,} documents{skipped}, {dataset.tokens:,} tokens")
        if checksum:
            lines.append(f"sha256 {sha256_of(Path(dataset.prefix + '.bin'))}  {dataset.prefix}.bin")
    if report.repaired:
        lines.append(f"{report.repaired:,} texts contained invalid Unicode characters, which were replaced by '?'")
    if report.bad:
        lines.append(report.bad)
    if not options.append_eod:
        lines.append("note: documents are not separated; --append-eod ends each with the end-of-text token")
    lines.append(
        f"{elapsed(report.seconds)}, {report.tokens_per_second:,.0f} tokens/s with {options.num_workers} worker(s)"
    )
    return lines
