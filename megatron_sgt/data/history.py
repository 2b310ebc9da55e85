"""In which orders of the data a run has read. No torch.

Its checkpoints keep it, so that a later start can tell what a change of the settings or of the files skips, repeats or
leaks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megatron_sgt.config.root import Config
from megatron_sgt.data.blend import round_to_period
from megatron_sgt.data.indexed import content_digest, lengths_digest, sequence_lengths
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.data.splits import SplitPart, split_bounds, split_parts
from megatron_sgt.errors import CheckpointError

INDEXED = "indexed"
_NOT_THE_ORDER = {
    "num_workers", "allow_validation_leak", "reset_attention_mask", "reset_position_ids", "eod_mask_loss",
}  # fmt: skip
"""Settings of the data that leave every sample its tokens."""


@dataclass(frozen=True)
class DataFile:
    """One .bin/.idx pair, as it was. ``documents``: its sequences; digests as in data/indexed.py."""

    weight: float
    prefix: str
    documents: int
    tokens: int
    lengths: str
    content: str

    def same(self, other: DataFile) -> bool:
        """Whether both hold the same documents, wherever they lie."""
        return (self.lengths, self.content) == (other.lengths, other.content)

    def begins(self, other: DataFile, lengths: np.ndarray) -> bool:
        """Whether ``other``, whose sequences have ``lengths``, is this file with documents appended."""
        return (
            self.documents < other.documents
            and lengths_digest(lengths[: self.documents]) == self.lengths
            and content_digest(other.prefix, self.tokens) == self.content
        )


@dataclass(frozen=True)
class DataOrder:
    """All that the order of a run's samples depends on. ``files``: of its blend; empty for a registered data set."""

    dataset: str
    seq_length: int
    seed: int
    split: str
    shares: tuple[float, float, float]
    files: tuple[DataFile, ...]

    def same(self, other: DataOrder) -> bool:
        """Whether sample i is the same tokens in both, for every i, and the same documents are held out."""
        return self._key() == other._key()

    def parts(self, place: int, lengths: np.ndarray) -> tuple[SplitPart, ...]:
        """The splits of a file, whose sequences have ``lengths``."""
        return split_parts(lengths[: self.files[place].documents], self.shares, self.seq_length)

    def bounds(self, place: int) -> list[tuple[int, int]]:
        """The documents of training, validation and test of a file."""
        return split_bounds(self.files[place].documents, self.shares)

    def weights(self) -> tuple[int, ...]:
        return round_to_period([file.weight for file in self.files]) if self.files else ()

    def differences(self, now: DataOrder) -> Iterator[str]:
        """What another order has changed, each in a few words, by setting or file."""
        if self.seq_length != now.seq_length:
            yield f"model.seq_length {self.seq_length} -> {now.seq_length}"
        if self.seed != now.seed:
            yield f"train.seed {self.seed} -> {now.seed}"
        if self.dataset != now.dataset:
            yield f"data.dataset {self.dataset} -> {now.dataset}"
        elif self.split != now.split:
            yield f"data.split {self.split} -> {now.split}" if now.dataset == INDEXED else "other settings of data"
        yield from _differing_files(self, now)

    def _key(self) -> tuple[Any, ...]:
        files = [(file.lengths, file.content, split_bounds(file.documents, self.shares)) for file in self.files]
        registered = None if self.dataset == INDEXED else self.split
        return self.dataset, self.seq_length, self.seed, self.weights(), files, registered


def _differing_files(then: DataOrder, now: DataOrder) -> Iterator[str]:
    before = {file.prefix: file for file in then.files}
    for file in now.files:
        old = before.get(file.prefix)
        if old is not None and not file.same(old):
            yield (
                f"{file.prefix} has {file.documents:,} documents ({file.tokens:,} tokens), not the {old.documents:,} "
                f"({old.tokens:,}) of then"
            )
    if [file.prefix for file in then.files] != [file.prefix for file in now.files] or then.weights() != now.weights():
        yield f"data.data_path {_blend(then)} -> {_blend(now)}"


def _blend(order: DataOrder) -> str:
    if len(order.files) == 1:
        return order.files[0].prefix
    return " ".join(f"{file.weight:.4g} {file.prefix}" for file in order.files)


@dataclass(frozen=True)
class Span:
    """Samples number ``start`` .. ``stop`` - 1 of a run, drawn from ``order``."""

    order: DataOrder
    start: int
    stop: int


def order_of(config: Config) -> DataOrder:
    """The order of ``config``'s samples, over the files as they are.

    Raises:
        DataError: a file is missing or damaged.
    """
    data, files = config.data, []
    if data.dataset == INDEXED:
        for weight, path in data.blend() if data.data_path else ():
            prefix = resolve_prefix(path)[0]
            lengths = sequence_lengths(prefix)
            tokens = int(lengths.sum(dtype=np.int64))
            digests = lengths_digest(lengths), content_digest(prefix, tokens)
            files.append(DataFile(weight, prefix, len(lengths), tokens, *digests))
    named = data.split if data.dataset == INDEXED else _digest(data.model_dump_json(exclude=_NOT_THE_ORDER))
    return DataOrder(data.dataset, config.model.seq_length, config.train.seed, named, data.split_shares(), tuple(files))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_json(spans: Sequence[Span], now: DataOrder, consumed: int) -> list[dict[str, Any]]:
    """What a checkpoint keeps: from which sample on the run has read in which order, the last being ``now``.

    Without ``spans`` nothing is known of what was ``consumed``.
    """
    kept = [span for span in spans if span.start < min(span.stop, consumed)]
    begins = [(span.start, span.order) for span in kept]
    if not begins or not begins[-1][1].same(now):
        begins.append((consumed, now))
    return [{"from_sample": start, **asdict(order)} for start, order in begins]


def from_json(kept: Any, consumed: int) -> tuple[Span, ...]:
    """The spans of a run that has read ``consumed`` samples.

    Raises:
        CheckpointError: the record is damaged.
    """
    try:
        orders = [(int(entry["from_sample"]), _order(entry)) for entry in kept]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the record of the data is damaged ({error!r})") from error
    stops = [start for start, _ in orders[1:]] + [consumed]
    spans = tuple(Span(order, start, stop) for (start, order), stop in zip(orders, stops, strict=True))
    if any(not 0 <= span.start <= span.stop for span in spans):
        raise CheckpointError("the record of the data is damaged (its samples do not follow each other)")
    return spans


def _order(entry: Mapping[str, Any]) -> DataOrder:
    files = tuple(
        DataFile(
            float(file["weight"]),
            str(file["prefix"]),
            int(file["documents"]),
            int(file["tokens"]),
            str(file["lengths"]),
            str(file["content"]),
        )
        for file in entry["files"]
    )
    train, valid, test = map(float, entry["shares"])
    return DataOrder(
        str(entry["dataset"]),
        int(entry["seq_length"]),
        int(entry["seed"]),
        str(entry["split"]),
        (train, valid, test),
        files,
    )
