"""Several indexed data sets as one: their tokens and indices end to end, and one record of how they were made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sgt.data.documents import BadDocuments
from megatron_sgt.data.indexed import (
    IndexedInfo,
    check_indexed_dataset,
    document_boundaries,
    read_metadata,
    sequence_lengths,
)
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.data.resume import Origin
from megatron_sgt.data.writer import LENGTHS_AT, DatasetWriter
from megatron_sgt.errors import DataError

_SAME = {
    "tokenizer_fingerprint": "were made with different tokenizers",
    "tokenizer_ids": "were made with versions of the tokenizer's library that give different ids",
    "vocab_size": "were made with vocabularies of different sizes",
    "append_eod": "differ in whether documents end with the end-of-text token (--append-eod)",
    "add_bos": "differ in whether documents begin with the beginning-of-text token (--add-bos)",
}
"""Field of the records -> what to say of two data sets in which it differs."""


@dataclass(frozen=True)
class _Part:
    """One of the data sets."""

    info: IndexedInfo
    record: dict[str, Any]
    """Empty for one that Megatron itself has written."""

    @property
    def prefix(self) -> str:
        return self.info.prefix

    @property
    def origin(self) -> Origin | None:
        return Origin(**self.record["made_from"]) if "made_from" in self.record else None

    @property
    def shard(self) -> tuple[int, int] | None:
        """Its index and the number of all."""
        text = self.origin.settings["--shard"] if self.origin else None
        if text is None:
            return None
        index, count = text.split("/")
        return int(index), int(count)


def merge(paths: Sequence[str], output: str, overwrite: bool = False) -> IndexedInfo:
    """Write the data sets at ``paths``, in this order, as the data set ``output``; returns what it holds.

    They are streamed: memory does not grow with them. Data sets that Megatron itself has written have no record; a
    merged one of these has none either.

    Raises:
        DataError: a missing or damaged data set, one that is named twice, ids of different widths or tokenizers,
            documents that begin or end otherwise, a shard that is missing or out of order, ``output`` exists and may
            not be overwritten, nothing to write.
    """
    parts = [_read(path) for path in paths]
    prefixes = [part.prefix for part in parts]
    if repeated := [prefix for prefix in prefixes if prefixes.count(prefix) > 1]:
        raise DataError(f"{repeated[0]} is named more than once; name each data set once")
    if Path(output).absolute() in [Path(prefix).absolute() for prefix in prefixes]:
        raise DataError(f"{output} is one of the data sets to merge; choose another --output-prefix")
    _check_same(parts)
    _check_shards(parts)
    if not any(part.info.sequences for part in parts):
        raise DataError(f"nothing to write to {output}.bin: {', '.join(prefixes[:3])} hold no document")
    with DatasetWriter(output, parts[0].info.dtype, overwrite) as writer:
        for part in parts:
            writer.append(part.prefix, sequence_lengths(part.prefix), part.info.tokens)
        writer.commit(_record(parts), _boundaries(parts))
    return check_indexed_dataset(output)


def _read(path: str) -> _Part:
    prefix, _ = resolve_prefix(path)
    info = check_indexed_dataset(prefix)
    if Path(prefix + ".idx").stat().st_size != LENGTHS_AT + 12 * info.sequences + 8 * (info.documents + 1):
        raise DataError(f"{prefix}.idx holds more than lengths and boundaries: a multimodal data set is not merged")
    return _Part(info, read_metadata(prefix))


def _check_same(parts: Sequence[_Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        both = f"{first.prefix} and {part.prefix}"
        if part.info.dtype != first.info.dtype:
            raise DataError(
                f"{both} store ids as {first.info.dtype} and {part.info.dtype}: their vocabularies differ; merge what "
                "was made with one tokenizer"
            )
        if bool(part.record) != bool(first.record):
            unknown = part if first.record else first
            raise DataError(
                f"nothing says which tokenizer {unknown.prefix} was made with ({unknown.prefix}.json is missing), and "
                f"{(first if first.record else part).prefix} has such a record; merge those with one and those without "
                "separately"
            )
        for name, message in _SAME.items():
            if _field(first, name) != _field(part, name):
                raise DataError(f"{both} {message}; merge what was made alike")


def _field(part: _Part, name: str) -> Any:
    """What its record says; the switches were off before there was a word for them."""
    return part.record.get(name, False if name in ("add_bos", "append_eod") else None)


def _check_shards(parts: Sequence[_Part]) -> None:
    """Refuse shards of one input of which not all are there, in their order."""
    before: _Part | None = None
    for part in parts:
        wanted, count = (before.shard[0] + 1, before.shard[1]) if before and before.shard else (0, 0)
        if before is not None or part.shard:
            if part.shard is None or part.shard[0] != wanted or count not in (0, part.shard[1]):
                raise DataError(_missing(before, part))
            if before is not None and (change := _change(before, part)):
                raise DataError(f"{before.prefix} and {part.prefix} are no shards of the same input: {change}")
        before = part if part.shard and part.shard[0] + 1 < part.shard[1] else None
    if before is not None:
        raise DataError(_missing(before, None))


def _missing(before: _Part | None, part: _Part | None) -> str:
    known = before or part
    assert known is not None and known.shard is not None, "one of them is a shard"
    index = before.shard[0] + 1 if before and before.shard else 0
    place = f"after {before.prefix}" if before else f"before {known.prefix}"
    return f"shard {index}/{known.shard[1]} is missing {place}: name all shards of an input, in their order"


def _change(one: _Part, other: _Part) -> str | None:
    a, b = (
        Origin({name: value for name, value in part.origin.settings.items() if name != "--shard"}, part.origin.inputs)
        for part in (one, other)
        if part.origin is not None
    )
    return a.change(b)


def _boundaries(parts: Sequence[_Part]) -> Iterator[np.ndarray]:
    """Of all documents, in sequences."""
    yield np.zeros(1, np.int64)
    before = 0
    for part in parts:
        boundaries = document_boundaries(part.prefix)
        for start in range(1, len(boundaries), 1 << 20):
            yield boundaries[start : start + (1 << 20)] + before
        before += part.info.sequences


def _record(parts: Sequence[_Part]) -> dict[str, Any] | None:
    """That of a run that had made them all; None if they have none."""
    if not parts[0].record:
        return None
    record = {name: parts[0].record[name] for name in ("tokenizer", *_SAME) if name in parts[0].record}
    bad = sum(part.record.get("bad_documents", 0) for part in parts)
    record["bad_documents"] = bad
    if bad:
        others = sum(part.info.documents + part.record.get("empty_documents", 0) for part in parts)
        record["bad_share"] = BadDocuments(bad, bad).share(others)
        record["first_bad_document"] = next(
            part.record["first_bad_document"] for part in parts if part.record.get("bad_documents")
        )
    return record
