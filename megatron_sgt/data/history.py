"""What decides the order of a run's samples: settings, and the files as they are. No torch.

Checkpoints keep it (ledger.py), so that a later start knows its sources again, goes on in each where it was, and can
tell what a change of the settings skips, repeats or leaks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_sgt.config.data import DataConfig
from megatron_sgt.config.root import Config
from megatron_sgt.data.blend import round_to_period
from megatron_sgt.data.indexed import content_digest, lengths_digest, sequence_lengths
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.data.splits import SplitPart, split_bounds, split_parts

INDEXED = "indexed"
Key = tuple[tuple[str, str], int]
"""(digests, how often they have stood in the order by then)."""
_ALWAYS_DIGESTED = ("dataset", "data_path", "split", "data_cache_path", "tokenizer", "seq_length_curriculum")
_NOT_THE_ORDER = {
    "num_workers", "allow_validation_leak", "allow_changed_data", "reset_attention_mask", "reset_position_ids",
    "eod_mask_loss", "packing",
}  # fmt: skip
"""Settings of the data that leave every sample its tokens, and the packing, which is kept beside them."""


@dataclass(frozen=True)
class DataFile:
    """One .bin/.idx pair, as it was. ``documents``: its sequences; digests as in data/indexed.py.

    ``samples``: of one epoch of its training split; 0 where a record of an earlier version does not say it.
    """

    weight: float
    prefix: str
    documents: int
    tokens: int
    lengths: str
    content: str
    samples: int = 0

    @property
    def holds(self) -> tuple[str, str]:
        return self.lengths, self.content

    def same(self, other: DataFile) -> bool:
        """Whether both hold the same documents, wherever they lie."""
        return self.holds == other.holds


@dataclass(frozen=True)
class DataOrder:
    """All that the order of a run's samples depends on. ``files``: of its blend; empty for a registered data set."""

    dataset: str
    seq_length: int
    seed: int
    split: str
    shares: tuple[float, float, float]
    files: tuple[DataFile, ...]
    packing: str = "concat"

    def same(self, other: DataOrder) -> bool:
        """Whether sample i is the same tokens in both, for every i, and the same documents are held out."""
        return self._key() == other._key()

    def parts(self, lengths: np.ndarray) -> tuple[SplitPart, ...]:
        """The splits of a file whose sequences have ``lengths``."""
        return split_parts(lengths, self.shares, self.seq_length, self.packing)

    def bounds(self, place: int) -> list[tuple[int, int]]:
        """The documents of training, validation and test of a file."""
        return split_bounds(self.files[place].documents, self.shares)

    def windows(self, place: int, documents: int | None = None) -> tuple[Any, ...]:
        """What cuts and shuffles the first ``documents`` of a file (None: all) into samples, but for its number."""
        number = self.files[place].documents if documents is None else documents
        return self.seq_length, self.seed, split_bounds(number, self.shares)[0], self.packing

    def sources(self) -> tuple[tuple[Key, DataFile], ...]:
        """The files, and by what each is known in other orders; one that stands there twice is two sources."""
        found: dict[tuple[str, str], int] = {}
        sources = []
        for file in self.files:
            found[file.holds] = found.get(file.holds, 0) + 1
            sources.append(((file.holds, found[file.holds]), file))
        return tuple(sources)

    def weights(self) -> tuple[int, ...]:
        return round_to_period([file.weight for file in self.files]) if self.files else ()

    def differences(self, now: DataOrder) -> Iterator[str]:
        """What another order has changed, each in a few words, by setting or file."""
        if self.seq_length != now.seq_length:
            yield f"model.seq_length {self.seq_length} -> {now.seq_length}"
        if self.seed != now.seed:
            yield f"train.seed {self.seed} -> {now.seed}"
        if self.packing != now.packing:
            yield f"data.packing {self.packing} -> {now.packing}"
        if self.dataset != now.dataset:
            yield f"data.dataset {self.dataset} -> {now.dataset}"
        elif self.split != now.split:
            yield f"data.split {self.split} -> {now.split}" if now.dataset == INDEXED else "other settings of data"
        yield from _differing_files(self, now)

    def _key(self) -> tuple[Any, ...]:
        files = [(file.lengths, file.content, split_bounds(file.documents, self.shares)) for file in self.files]
        registered = None if self.dataset == INDEXED else self.split
        return self.dataset, self.seq_length, self.seed, self.weights(), files, registered, self.packing


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


def order_of(config: Config, data_path: Sequence[str] | None = None) -> DataOrder:
    """The order of ``config``'s samples, over the files as they are; ``data_path``: another blend than its own.

    Raises:
        DataError: a file is missing or damaged.
    """
    data, files = config.data, []
    if data_path is not None:
        data = data.model_copy(update={"data_path": tuple(data_path)})
    shares, seq_length = data.split_shares(), config.model.seq_length
    if data.dataset == INDEXED:
        for weight, path in data.blend() if data.data_path else ():
            prefix = resolve_prefix(path)[0]
            lengths = sequence_lengths(prefix)
            tokens = int(lengths.sum(dtype=np.int64))
            digests = lengths_digest(lengths), content_digest(prefix, tokens)
            samples = split_parts(lengths, shares, seq_length, data.packing)[0].samples
            files.append(DataFile(weight, prefix, len(lengths), tokens, *digests, samples))
    named = data.split if data.dataset == INDEXED else _digest(data)
    return DataOrder(data.dataset, seq_length, config.train.seed, named, shares, tuple(files), data.packing)


def grown_files(old: Iterable[DataFile], now: Iterable[DataFile]) -> Callable[[DataFile, DataFile], bool]:
    """A function that tells whether a file of ``now`` is one of ``old`` with documents appended; it reads nothing."""
    found = set()
    for file in set(now):
        lengths, counted, tokens = sequence_lengths(file.prefix), 0, 0
        for one in sorted((one for one in set(old) if one.documents < file.documents), key=lambda one: one.documents):
            tokens += int(lengths[counted : one.documents].sum(dtype=np.int64))  # no array of all their ends
            counted = one.documents
            if one.tokens == tokens and (
                lengths_digest(lengths[:counted]) == one.lengths and content_digest(file.prefix, tokens) == one.content
            ):
                found.add((one.holds, file.holds))
    return _Begins(frozenset(found))


@dataclass(frozen=True)
class _Begins:
    """Pairs of what two files hold, of which the second begins with the first."""

    pairs: frozenset[tuple[tuple[str, str], tuple[str, str]]]

    def __call__(self, old: DataFile, new: DataFile) -> bool:
        return (old.holds, new.holds) in self.pairs


def _digest(data: DataConfig) -> str:
    """Of all that a registered data set can read; settings that earlier versions did not have count if they are set."""
    unset = {
        name
        for name, field in type(data).model_fields.items()
        if name not in _ALWAYS_DIGESTED and getattr(data, name) == field.get_default(call_default_factory=True)
    }
    return hashlib.sha256(data.model_dump_json(exclude=_NOT_THE_ORDER | unset).encode()).hexdigest()[:12]


def order_from_json(entry: Mapping[str, Any]) -> DataOrder:
    """The inverse of ``dataclasses.asdict``; records of earlier versions know no ``samples``."""
    files = tuple(
        DataFile(
            float(file["weight"]),
            str(file["prefix"]),
            int(file["documents"]),
            int(file["tokens"]),
            str(file["lengths"]),
            str(file["content"]),
            int(file.get("samples", 0)),
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
        str(entry.get("packing", "concat")),
    )
