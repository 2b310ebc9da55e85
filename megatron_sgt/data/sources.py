"""Finds, checks and splits the data sets of a configuration. Needs no process group."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sgt import extensions
from megatron_sgt.config.root import Config
from megatron_sgt.data.blend import round_to_period
from megatron_sgt.data.indexed import (
    IndexedInfo,
    check_indexed_dataset,
    content_digest,
    lengths_digest,
    sequence_lengths,
)
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.data.splits import SplitPart, split_parts
from megatron_sgt.data.tokenizer import Tokenizer, resolve_vocab_size, tokenizer_of
from megatron_sgt.errors import DataError

_WHOLE = (0.0, 1.0, 0.0)
"""Shares of a data set that is validated on as a whole."""


@dataclass(frozen=True)
class Source:
    """One data set of the blend."""

    weight: float
    info: IndexedInfo
    parts: tuple[SplitPart, ...]
    """train, valid, test"""
    note: str | None
    """What had to be assumed to find it."""


@dataclass(frozen=True)
class DataSummary:
    """What a run would train on, over all data sets; samples are sequences of ``seq_length`` tokens."""

    sources: tuple[Source, ...]
    tokenizer: str | None
    vocab_size: int
    """Token ids before padding."""
    documents: int
    tokens: int
    train_samples: int
    valid_samples: int
    test_samples: int
    samples_needed: int
    """Of all steps."""
    notes: tuple[str, ...]
    padding: float | None = None
    """Share of a training sample, on average over the first blend; None where samples are filled without any."""
    unread: str | None = None
    """Name of a registered data set, of which nothing is known before the run starts: the numbers above are 0."""

    @property
    def epochs(self) -> float:
        """How often the run sees each training sample, on average over the blend."""
        return self.samples_needed / self.train_samples

    def line(self) -> str:
        if self.unread is not None:
            return f"'{self.unread}', read when the run starts"
        return (
            f"{self.documents:,} documents · {self.tokens:,} tokens · {self.train_samples:,} training samples · "
            f"{self.epochs:.2f} epochs · vocabulary {self.vocab_size:,}"
            + ("" if self.padding is None else f" · padding {100 * self.padding:.2f} %")
        )


def find_sources(cfg: Config, tokenizer: Tokenizer | None) -> tuple[Source, ...]:
    """Find and check every data set of ``cfg.data.data_path``.

    Raises:
        DataError: no data, a missing or damaged file, ids outside the vocabulary, another tokenizer,
            documents that begin otherwise than data.tokenizer.add_bos says, a blend weight too small to count, fewer
            tokens than one sample in the training split, or in the validation split when ``train.eval_interval`` asks
            for it (a share of 0 is none, where ``data.valid`` names other sets).
    """
    blend = cfg.data.blend() if cfg.data.data_path else ()
    if not blend:
        raise DataError(
            "data.data_path is empty; give the prefix of a .bin/.idx pair (tools/preprocess_data.py makes one)"
        )
    try:
        round_to_period([weight for weight, _ in blend])
    except ValueError as error:
        raise DataError(f"data.data_path: {error}") from error
    sources = []
    for weight, path in blend:
        source = _checked(cfg, tokenizer, path, weight, cfg.data.split_shares())
        _require_samples(cfg, source.info, source.parts)
        sources.append(source)
    return tuple(sources)


def sources_of_run(cfg: Config, tokenizer: Tokenizer | None) -> tuple[tuple[Source, ...], int]:
    """The data sets of every blend of the run, each once; how many of them are those of the first blend.

    Raises:
        DataError: as ``find_sources``; those of later blends need no validation samples.
    """
    sources = list(find_sources(cfg, tokenizer))
    blended = len(sources)
    for data_path in cfg.data_paths[1:]:
        later = cfg.model_copy(
            update={
                "data": cfg.data.model_copy(update={"data_path": data_path}),
                "train": cfg.train.model_copy(update={"eval_interval": 0}),
            }
        )
        known = {source.info.prefix for source in sources}
        sources += [source for source in find_sources(later, tokenizer) if source.info.prefix not in known]
    return tuple(sources), blended


def find_validation_sets(cfg: Config, tokenizer: Tokenizer | None) -> dict[str, Source]:
    """Find and check every data set of ``cfg.data.valid``; all of each is its validation part.

    Raises:
        DataError: as ``find_sources``; or a set is trained on, or a copy of what is, without
            data.allow_validation_leak.
    """
    found = {}
    for name, path in cfg.data.valid.items():
        source = found[name] = _checked(cfg, tokenizer, path, 1.0, _WHOLE)
        if source.parts[1].samples == 0:
            raise DataError(
                f"data.valid.{name}: {source.info.prefix} has {source.info.tokens} tokens, less than one sample of "
                f"{cfg.model.seq_length} + 1; use more text or a smaller model.seq_length"
            )
        same = next((path for path in cfg.data_prefixes if _same_data(resolve_prefix(path)[0], source.info)), None)
        if same is not None and not cfg.data.allow_validation_leak:
            raise DataError(
                f"data.valid.{name}: {source.info.prefix} is trained on (data.data_path: {same}), so that validation "
                "would measure what was trained on; name other text, or set data.allow_validation_leak to true"
            )
    return found


def _checked(
    cfg: Config, tokenizer: Tokenizer | None, path: str, weight: float, shares: tuple[float, float, float]
) -> Source:
    prefix, note = resolve_prefix(path)
    info = check_indexed_dataset(
        prefix,
        resolve_vocab_size(cfg.model.vocab_size, tokenizer),
        tokenizer.fingerprint() if tokenizer is not None else None,
        None if cfg.data.tokenizer is None else cfg.data.tokenizer.add_bos,
    )
    return Source(
        weight, info, split_parts(sequence_lengths(prefix), shares, cfg.model.seq_length, cfg.data.packing), note
    )


def _same_data(prefix: str, other: IndexedInfo) -> bool:
    """Whether two data sets are one file, or one is a copy of the other."""
    if os.path.realpath(f"{prefix}.bin") == os.path.realpath(f"{other.prefix}.bin"):
        return True
    lengths = sequence_lengths(prefix)
    if len(lengths) != other.sequences or lengths_digest(lengths) != other.lengths_digest:
        return False
    return content_digest(prefix, other.tokens) == content_digest(other.prefix, other.tokens)


def eval_samples(cfg: Config, size: int) -> int:
    """How many samples of a set of ``size`` one validation reads."""
    return min(size, cfg.train.eval_iters * cfg.train.global_batch_size)


def validate_data(cfg: Config) -> DataSummary:
    """Check everything about the data that can be checked before a process group exists.

    Raises:
        DataError: with the first problem found.
    """
    tokenizer = tokenizer_of(cfg.data)
    if cfg.data.dataset != "indexed":
        extensions.load("datasets", cfg.data.dataset)
        vocab_size = resolve_vocab_size(cfg.model.vocab_size, tokenizer)
        return DataSummary((), None, vocab_size, 0, 0, 0, 0, 0, 0, (), unread=cfg.data.dataset)
    sources, blended = sources_of_run(cfg, tokenizer)
    train = sum(source.parts[0].samples for source in sources)
    valid, test = (sum(source.parts[split].samples for source in sources[:blended]) for split in (1, 2))
    sets = find_validation_sets(cfg, tokenizer)
    notes = [source.note for source in (*sources, *sets.values()) if source.note]
    for name, source in sets.items():
        size = source.parts[1].samples
        read = eval_samples(cfg, size)
        reads = f"each validation reads {'all' if read == size else f'the first {read:,} of'} its {size:,} samples"
        if not cfg.train.eval_interval:
            reads = "never measured while train.eval_interval is 0"
        notes.append(
            f"validation set {name}: {source.info.documents:,} documents, {source.info.tokens:,} tokens; {reads}"
        )
    eval_needed = cfg.train.eval_iters * cfg.train.global_batch_size
    if cfg.train.eval_interval and eval_needed > valid > 0:
        notes.append(
            f"each validation reads {eval_needed} samples (eval_iters {cfg.train.eval_iters} x "
            f"global_batch_size {cfg.train.global_batch_size}) of a split that has {valid}: some count more "
            "than once"
        )
    return DataSummary(
        sources=sources,
        tokenizer=tokenizer.name if tokenizer is not None else None,
        vocab_size=resolve_vocab_size(cfg.model.vocab_size, tokenizer),
        documents=sum(source.info.documents for source in sources),
        tokens=sum(source.info.tokens for source in sources),
        train_samples=train,
        valid_samples=valid,
        test_samples=test,
        samples_needed=cfg.batches.samples(cfg.train.train_iters),
        notes=tuple(notes),
        padding=_padding(sources[:blended], cfg.model.seq_length) if cfg.data.packing == "best_fit" else None,
    )


def _padding(sources: Sequence[Source], seq_length: int) -> float:
    train = [source.parts[0] for source in sources]
    share = [1 - part.tokens / (part.samples * seq_length) for part in train]
    return sum(source.weight * empty for source, empty in zip(sources, share, strict=True))


def _require_samples(cfg: Config, info: IndexedInfo, parts: tuple[SplitPart, ...]) -> None:
    seq_length = cfg.model.seq_length
    train, valid, _ = parts
    least = "one token" if cfg.data.packing == "best_fit" else f"one sample of {seq_length} + 1"
    for part, wanted, remedy in (
        (train, True, "use more text or a smaller model.seq_length"),
        (
            valid,
            cfg.train.eval_interval > 0 and not (cfg.data.valid and cfg.data.split_shares()[1] == 0),
            "give it a larger share, use more text, or set train.eval_interval to 0",
        ),
    ):
        if wanted and part.samples == 0:
            raise DataError(
                f"{info.prefix}: the {part.name} split (data.split {cfg.data.split}) gets "
                f"{part.last - part.first} of {info.sequences} documents with {part.tokens} tokens, less "
                f"than {least}; {remedy}"
            )
