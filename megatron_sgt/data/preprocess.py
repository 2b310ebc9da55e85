"""Text files to Megatron's indexed data sets: PREFIX_<key>_document.bin and .idx."""

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.data.documents import BadDocuments
from megatron_sgt.data.encoding import encode_chunks
from megatron_sgt.data.export_form import export_form
from megatron_sgt.data.indexed import read_metadata
from megatron_sgt.data.inputs import InputFile, Kind, find_inputs
from megatron_sgt.data.progress import Progress, note
from megatron_sgt.data.readers import read_chunks
from megatron_sgt.data.resume import Journal, Mark, Origin
from megatron_sgt.data.shards import Shard, files_of
from megatron_sgt.data.tokenizer import Tokenizer, build_tokenizer
from megatron_sgt.data.writer import DatasetWriter, Written, finish
from megatron_sgt.errors import DataError
from megatron_sgt.files import sha256_of
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
    resume: bool = False
    """Go on where a killed run was; keep what is finished, and what an error leaves unfinished."""
    shard: Shard | None = None
    """Of the input only this part, in data sets of its own; None: all."""

    @property
    def prefix(self) -> str:
        """Of everything that is written."""
        return self.shard.prefix(self.output_prefix) if self.shard else self.output_prefix

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Of the data set of each key."""
        return tuple(f"{self.prefix}_{key}_document" for key in self.json_keys)


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
    resumed_tokens: int = 0
    """Which an earlier process has written."""
    kept: bool = False
    """Everything was finished before."""

    @property
    def tokens_per_second(self) -> float:
        return (sum(dataset.tokens for dataset in self.datasets) - self.resumed_tokens) / max(self.seconds, 1e-9)


def preprocess(options: PreprocessOptions) -> PreprocessReport:
    """Tokenize all documents, one data set per key; the result does not depend on the number of workers.

    Files are renamed into place when they are complete. A killed process leaves ``PREFIX.resume`` beside its temporary
    files, with which one with ``resume`` goes on; without it they are written over. Memory: a few chunks of about a
    megabyte per worker, whatever the size of the input.

    Raises:
        DataError: unreadable input, more bad documents than ``max_bad_documents`` (the first with file and line),
            output that exists (without ``overwrite``), no document with a token at all (but in a shard), other inputs
            or settings than the run had that is to be resumed.
    """
    _check_keys(options.json_keys)
    found = find_inputs(options.inputs, options.input_format)
    for text in found.notes:
        note(text)
    tokenizer = build_tokenizer(options.tokenizer)
    if exported := export_form(options.tokenizer).line:
        note(exported)
    _check_boundaries(tokenizer, options)
    about = _metadata(tokenizer, options)
    origin = Origin.of(_settings(about, options), found.files)
    if options.resume and (kept := _finished(options, origin)):
        return kept
    files = files_of(options.shard, found.files) if options.shard else found.files
    journal = Journal(options.prefix, origin, options.overwrite)
    mark = journal.read() if options.resume else None
    start = time.monotonic()
    dtype = "uint16" if tokenizer.vocab_size < UINT16_BELOW else "int32"
    resumed = sum(written.tokens for written in mark.written) if mark else 0
    if mark is None or not mark.is_end:
        mark = _write(options, files, dtype, journal, mark, about, origin)
    else:
        for prefix, written in zip(options.prefixes, mark.written, strict=True):
            finish(prefix, dtype, written, about | _counts(mark, options, origin, written))
        journal.remove()
    datasets = tuple(
        WrittenDataset(prefix, written.documents, written.tokens, written.empty)
        for prefix, written in zip(options.prefixes, mark.written, strict=True)
    )
    bad = BadDocuments(options.max_bad_documents, mark.bad, mark.first_bad)
    line = bad.line(mark.written[0].documents + mark.written[0].empty)
    return PreprocessReport(datasets, mark.repaired, line, time.monotonic() - start, resumed)


def _write(
    options: PreprocessOptions,
    files: Sequence[InputFile],
    dtype: str,
    journal: Journal,
    mark: Mark | None,
    about: dict[str, Any],
    origin: Origin,
) -> Mark:
    """Write the data sets from ``mark`` on, and give them their names."""
    total_bytes = sum(file.read_bytes for file in files)
    if mark is not None:
        share = mark.bytes_read / max(1, total_bytes)
        note(f"goes on at {100 * share:.1f} % of the input, after {mark.written[0].documents:,} documents")
    before = mark or Mark(tuple(Written() for _ in options.json_keys))
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                DatasetWriter(prefix, dtype, journal.overwrite, written if mark else None, options.resume)
            )
            for prefix, written in zip(options.prefixes, before.written, strict=True)
        ]
        if not options.resume:
            stack.callback(journal.remove)
        journal.save(before)
        progress = stack.enter_context(Progress("tokenizing", total_bytes - before.bytes_read))
        chunks = read_chunks(files, options.json_keys, say=note, start=before.position)
        encoded_chunks = stack.enter_context(
            contextlib.closing(
                encode_chunks(
                    chunks, options.tokenizer, options.json_keys, options.append_eod, dtype, options.num_workers
                )
            )
        )
        mark = before
        bad = BadDocuments(options.max_bad_documents, before.bad, before.first_bad)
        for chunk in encoded_chunks:
            bad.add(chunk.num_bad, chunk.first_bad)
            for writer, encoded in zip(writers, chunk.keys, strict=True):
                writer.add(encoded)
            mark = Mark(
                written=tuple(writer.written for writer in writers),
                position=chunk.end,
                bytes_read=before.bytes_read + chunk.bytes_read,
                repaired=mark.repaired + chunk.num_repaired,
                bad=bad.count,
                first_bad=bad.first,
            )
            if journal.is_due:
                _save(journal, writers, mark)
            progress.update(chunk.bytes_read, writers[0].documents, sum(writer.tokens for writer in writers))
        if options.shard is None:
            _check_written(writers)
        mark = replace(mark, is_end=True)
        _save(journal, writers, mark)
        for writer in writers:
            writer.commit(about | _counts(mark, options, origin, writer.written))
        journal.remove()
    return mark


def _save(journal: Journal, writers: Sequence[DatasetWriter], mark: Mark) -> None:
    for writer in writers:
        writer.save()
    journal.save(mark)


def _check_written(writers: Sequence[DatasetWriter]) -> None:
    for writer in writers:
        if writer.documents == 0:
            raise DataError(f"nothing to write to {writer.prefix}.bin: the input has no document with text in it")


def _finished(options: PreprocessOptions, origin: Origin) -> PreprocessReport | None:
    """What a run with the same input and settings has completed, if there is such a thing.

    Raises:
        DataError: something is there that was made otherwise.
    """
    if options.overwrite or Path(options.prefix + ".resume").exists():
        return None
    datasets = []
    for prefix in options.prefixes:
        if not (Path(prefix + ".bin").exists() and Path(prefix + ".idx").exists()):
            return None
        about = read_metadata(prefix)
        made_from = about.get("made_from")
        change = Origin(**made_from).change(origin) if made_from else "nothing says what it was made from"
        if change:
            raise DataError(f"{prefix}.bin/.idx exists already: {change}; choose another prefix or give --overwrite")
        datasets.append(WrittenDataset(prefix, about["documents"], about["tokens"], about["empty_documents"]))
    return PreprocessReport(tuple(datasets), 0, None, 0.0, 0, kept=True)


def _metadata(tokenizer: Tokenizer, options: PreprocessOptions) -> dict[str, Any]:
    return {
        "tokenizer": tokenizer.name,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "tokenizer_ids": tokenizer.digest_of_ids(),
        "vocab_size": tokenizer.vocab_size,
        "append_eod": options.append_eod,
        "add_bos": options.tokenizer.add_bos,
    }


def _settings(about: dict[str, Any], options: PreprocessOptions) -> dict[str, Any]:
    """What the content follows from, beside the input."""
    return {
        "--json-keys": list(options.json_keys),
        "--append-eod": options.append_eod,
        "--add-bos": options.tokenizer.add_bos,
        "--shard": str(options.shard) if options.shard else None,
        "the tokenizer": about["tokenizer_fingerprint"],
        "what the tokenizer makes of texts": about["tokenizer_ids"],
    }


def _counts(mark: Mark, options: PreprocessOptions, origin: Origin, written: Written) -> dict[str, Any]:
    """What a data set's record says beside its tokenizer; where it may be gone on with or merged, its origin too."""
    counts: dict[str, Any] = {"bad_documents": mark.bad}
    if mark.bad:
        share = BadDocuments(mark.bad, mark.bad).share(mark.written[0].documents + mark.written[0].empty)
        counts |= {"bad_share": share, "first_bad_document": str(mark.first_bad)}
    if options.resume or options.shard:
        counts |= {"empty_documents": written.empty, "made_from": asdict(origin)}
    return counts


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
        kept = "finished before, kept: " if report.kept else ""
        found = f"{kept}{dataset.documents:,} documents{skipped}, {dataset.tokens:,} tokens"
        lines.append(f"{dataset.prefix}.bin/.idx: {found}")
        if checksum:
            lines.append(f"sha256 {sha256_of(Path(dataset.prefix + '.bin'))}  {dataset.prefix}.bin")
    if report.kept:
        return lines
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
