"""Finds, checks and splits the data sets of a configuration. Needs no process group."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sgt import extensions
from megatron_sgt.config.root import Config
from megatron_sgt.data.blend import round_to_period
from megatron_sgt.data.indexed import IndexedInfo, check_indexed_dataset, sequence_lengths
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.data.splits import SplitPart, split_parts
from megatron_sgt.data.tokenizer import Tokenizer, resolve_vocab_size, tokenizer_of
from megatron_sgt.errors import DataError


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
    """train_iters times global_batch_size."""
    notes: tuple[str, ...]
    padding: float | None = None
    """Share of a training sample, on average over the blend; None where samples are filled without any."""
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
            for it.
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
    vocab_size = resolve_vocab_size(cfg.model.vocab_size, tokenizer)
    fingerprint = tokenizer.fingerprint() if tokenizer is not None else None
    add_bos = None if cfg.data.tokenizer is None else cfg.data.tokenizer.add_bos
    sources = []
    for weight, path in blend:
        prefix, note = resolve_prefix(path)
        info = check_indexed_dataset(prefix, vocab_size, fingerprint, add_bos)
        lengths = sequence_lengths(prefix)
        parts = split_parts(lengths, cfg.data.split_shares(), cfg.model.seq_length, cfg.data.packing)
        _require_samples(cfg, info, parts)
        sources.append(Source(weight, info, parts, note))
    return tuple(sources)


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
    sources = find_sources(cfg, tokenizer)
    train, valid, test = (sum(source.parts[split].samples for source in sources) for split in range(3))
    notes = [source.note for source in sources if source.note]
    eval_needed = cfg.train.eval_iters * cfg.train.global_batch_size
    if cfg.train.eval_interval and eval_needed > valid:
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
        samples_needed=cfg.train.train_iters * cfg.train.global_batch_size,
        notes=tuple(notes),
        padding=_padding(sources, cfg.model.seq_length) if cfg.data.packing == "best_fit" else None,
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
            cfg.train.eval_interval > 0,
            "give it a larger share, use more text, or set train.eval_interval to 0",
        ),
    ):
        if wanted and part.samples == 0:
            raise DataError(
                f"{info.prefix}: the {part.name} split (data.split {cfg.data.split}) gets "
                f"{part.last - part.first} of {info.sequences} documents with {part.tokens} tokens, less "
                f"than {least}; {remedy}"
            )
