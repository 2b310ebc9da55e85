"""The samples that a run trains on, in an order that depends only on (seed, sample index).

Megatron shuffles all epochs of a run together, so another ``train_iters`` gives another order. Here each
data set is a GPTDataset of exactly one epoch, or one epoch of packed sequences; epoch e of data set d is that
epoch under a permutation keyed by (seed, d, e); and the run's ledger says which data set sample i is drawn from,
and how many were before.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron_sgt import extensions
from megatron_sgt.config.data import DataConfig
from megatron_sgt.config.root import Config
from megatron_sgt.data.document_samples import DocumentSamples, check_documents
from megatron_sgt.data.index_cache import EVAL_SEED, build_index_cache, open_packed, open_split, wait_for_folder
from megatron_sgt.data.indexed import lengths_digest, sequence_lengths
from megatron_sgt.data.ledger import Drawing, Span
from megatron_sgt.data.permutation import RandomPermutation
from megatron_sgt.data.sources import Source, find_validation_sets, sources_of_run
from megatron_sgt.data.splits import SPLIT_NAMES, SplitPart, split_parts
from megatron_sgt.data.tokenizer import Tokenizer, resolve_vocab_size
from megatron_sgt.errors import DataError
from megatron_sgt.parallel.collectives import on_rank_zero

logger = logging.getLogger(__name__)

Sample = dict[str, torch.Tensor]

Builder = Callable[[Config, Tokenizer | None], tuple[Any, Any | None, Any | None]]
"""Makes the training, validation and test samples, None for a split that it lacks; called on every rank.

``samples[i]`` is a Sample like those of `BlendedSamples`, for any i >= 0, and the same in every process of every rank:
the position of a run is a count of samples. Data-parallel ranks read different i, tensor-parallel ranks the same.
With ``cfg.data.tells_documents`` samples have ``document_starts`` and ``num_tokens``; their ``position_ids`` and
``loss_mask`` are what ``cfg.data`` asks for.
"""


class BlendedSamples(Dataset[Sample]):
    """An endless sequence of samples: ``samples[i]`` for any i of the present blend, in constant time and memory.

    A sample is a dict of ``tokens`` [T] int64, ``labels`` [T] int64 (the next tokens), ``loss_mask`` [T] float32 and
    ``position_ids`` [T] int64. With ``DataConfig.tells_documents`` also ``document_starts`` [T] int32 (where in the
    sequence the document of each token begins; padding is a document of its own) and ``num_tokens`` int32 (the tokens
    before the padding). ``len()`` is one epoch: the samples of all data sets, each counted once.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        weights: Sequence[float],
        seed: int,
        shuffle: bool,
        vocab_size: int,
        names: Sequence[str],
    ) -> None:
        """``parts``: one epoch of each data set, those of the first blend before others; ``weights``: of that blend.

        ``shuffle``: a new order every epoch, or always theirs.
        """
        self.parts = list(parts)
        self.names = list(names)
        self._opened = len(self.parts)
        self._seed = seed
        self._shuffle = shuffle
        self._vocab_size = vocab_size
        self.draw(Drawing.from_zero(weights), range(len(weights)), [None] * len(weights))

    def draw(self, drawing: Drawing, parts: Sequence[int], former: Sequence[Any | None]) -> None:
        """Go on with another blend.

        Args:
            parts: by source of the blend, its place in ``parts``.
            former: of a source with a ``Former``, one epoch over its first documents.
        """
        self.parts = self.parts[: self._opened]
        self._drawing, self._of_source = drawing, tuple(parts)
        self._former: dict[int, int] = {}
        for d, part in enumerate(former):
            if part is not None:
                self._former[d] = len(self.parts)
                self.parts.append(part)
        self.names = self.names[: self._opened] + [self.names[parts[d]] for d in self._former]
        self._orders: dict[tuple[int, int], tuple[int, RandomPermutation]] = {}

    def __len__(self) -> int:
        return sum(len(self.parts[part]) for part in self._of_source)

    def locate(self, index: int) -> tuple[int, int]:
        """(d, j): sample ``index`` is element j of ``parts[d]``. A function of seed, ledger and index alone."""
        if index < self._drawing.origin:
            raise IndexError(f"sample index {index} is below {self._drawing.origin}, where the blend begins")
        source, place = self._drawing[index]
        d, drawn = self._of_source[source], place.drawn
        if place.former is not None:
            d, drawn = self._former[source], place.former.drawn
        epoch, position = divmod(drawn, len(self.parts[d]))
        if not self._shuffle:
            return d, position
        known = self._orders.get((d, place.number))
        if known is None or known[0] != epoch:
            known = (epoch, RandomPermutation(len(self.parts[d]), (self._seed, place.number, epoch)))
            self._orders[d, place.number] = known
        return d, known[1][position]

    def __getitem__(self, index: int) -> Sample:
        d, position = self.locate(index)
        sample = self.parts[d][position]
        highest = int(torch.maximum(sample["tokens"].max(), sample["labels"].max()))
        if highest >= self._vocab_size:
            raise DataError(
                f"{self.names[d]} holds token id {highest}, but the vocabulary has {self._vocab_size} ids: "
                "it was made with another tokenizer; set data.tokenizer (or model.vocab_size) to the one it "
                "was made with"
            )
        return sample


def follow(samples: Any, span: Span, cfg: Config) -> None:
    """Let the training samples of ``build_datasets`` go on as ``span`` says; collective.

    A registered data set has one order of its own, which goes on by itself.
    """
    files, places = span.order.files, span.drawing.places
    if not files:
        return
    former = {d: place.former.documents for d, place in enumerate(places) if place.former is not None}
    cuts: dict[int, tuple[_Cut, str]] = {}
    if former:  # what rank 0 has found out, the others need not read whole indices for
        cuts = on_rank_zero(
            lambda: {d: _built(cfg, _first_documents(cfg, files[d].prefix, n)) for d, n in former.items()}
        )
    parts: list[Any | None] = [None] * len(files)
    for d, (one, folder) in cuts.items():
        wait_for_folder(folder)
        parts[d] = _open_part(cfg.data, one.prefix, one.parts[0], cfg.model.seq_length, cfg.train.seed, folder)
    samples.draw(span.drawing, [samples.names.index(file.prefix) for file in files], parts)


@dataclass(frozen=True)
class _Cut:
    """A data set, or its first documents, as it is cut into splits."""

    prefix: str
    parts: tuple[SplitPart, ...]
    lengths_digest: str


def _first_documents(cfg: Config, prefix: str, number: int) -> _Cut:
    lengths, data = sequence_lengths(prefix)[:number], cfg.data
    parts = split_parts(lengths, data.split_shares(), cfg.model.seq_length, data.packing)
    return _Cut(prefix, parts, lengths_digest(lengths))


def _built(cfg: Config, cut: _Cut) -> tuple[_Cut, str]:
    """``cut``, and the folder of its sample indices."""
    about = cfg.model.seq_length, cfg.train.seed, str(cfg.data_cache_dir), cfg.data.packing
    return cut, build_index_cache(cut.prefix, cut.parts, cut.lengths_digest, *about)


@dataclass(frozen=True)
class _Prepared:
    """What rank 0 found and built, for all ranks to open. ``blended``: how many sources are of the first blend."""

    sources: tuple[Source, ...]
    folders: tuple[str, ...]
    blended: int


def build_datasets(cfg: Config, tokenizer: Tokenizer | None) -> tuple[Any, Any | None, Any | None]:
    """Training, validation and test samples of ``data.dataset``: of DATASETS, or from a registered ``Builder``.

    Raises:
        DataError: whatever the builder refuses; registered samples do not tell their documents as ``cfg.data`` asks.
    """
    name = cfg.data.dataset
    if name in DATASETS:
        return DATASETS[name](cfg, tokenizer)
    build: Builder = extensions.load("datasets", name)
    made = build(cfg, tokenizer)
    if cfg.data.tells_documents:
        for samples in made:
            if samples is not None:
                check_documents(samples[0], name)
    return made


def _indexed(
    cfg: Config, tokenizer: Tokenizer | None
) -> tuple[BlendedSamples, BlendedSamples | None, BlendedSamples | None]:
    """The blend of ``data.data_path``; None where some data set holds no whole sample.

    Collective: rank 0 checks the files and builds the sample indices under ``data_cache_path``, then all ranks map
    them. Training samples are shuffled again in every epoch; validation and test samples keep one order, which does not
    depend on the seed.

    Raises:
        DataError: on every rank, for whatever ``sources_of_run`` refuses.
    """
    vocab_size = resolve_vocab_size(cfg.model.vocab_size, tokenizer)
    prepared = on_rank_zero(lambda: _prepare(cfg, tokenizer))
    _await(prepared)
    train = _open(cfg, prepared, 0, vocab_size)
    assert train is not None, "sources_of_run refuses data without a training sample"
    return train, _open(cfg, prepared, 1, vocab_size), _open(cfg, prepared, 2, vocab_size)


def open_validation_sets(cfg: Config, tokenizer: Tokenizer | None) -> dict[str, BlendedSamples]:
    """The samples of every set of ``data.valid``, in an order that does not depend on the seed. Collective.

    ``len()`` of one is the number of its samples, all of which are different.

    Raises:
        DataError: on every rank, for whatever ``find_validation_sets`` refuses.
    """
    if not cfg.data.valid:
        return {}
    vocab_size, opened = resolve_vocab_size(cfg.model.vocab_size, tokenizer), {}
    for name, prepared in on_rank_zero(lambda: _prepare_sets(cfg, tokenizer)).items():
        _await(prepared)
        samples = _open(cfg, prepared, 1, vocab_size)
        assert samples is not None, "find_validation_sets refuses a set without a sample"
        opened[name] = samples
    return opened


def _prepare_sets(cfg: Config, tokenizer: Tokenizer | None) -> dict[str, _Prepared]:
    fixed = cfg.model_copy(update={"train": cfg.train.model_copy(update={"seed": EVAL_SEED})})
    sets = find_validation_sets(cfg, tokenizer)
    return {name: _prepared(fixed, (source,), 1) for name, source in sets.items()}


def _prepare(cfg: Config, tokenizer: Tokenizer | None) -> _Prepared:
    return _prepared(cfg, *sources_of_run(cfg, tokenizer))


def _prepared(cfg: Config, sources: tuple[Source, ...], blended: int) -> _Prepared:
    cuts = (_Cut(source.info.prefix, source.parts, source.info.lengths_digest) for source in sources)
    return _Prepared(sources, tuple(_built(cfg, cut)[1] for cut in cuts), blended)


def _await(prepared: _Prepared) -> None:
    """Say what was assumed, and wait until this rank sees what rank 0 has built."""
    for note in (source.note for source in prepared.sources if source.note):
        logger.info(note)
    for folder in prepared.folders:
        wait_for_folder(folder)


def _open(cfg: Config, prepared: _Prepared, split: int, vocab_size: int) -> BlendedSamples | None:
    training = SPLIT_NAMES[split] == "train"
    sources = prepared.sources if training else prepared.sources[: prepared.blended]
    if any(source.parts[split].samples == 0 for source in sources):
        return None
    seq_length, seed = cfg.model.seq_length, cfg.train.seed
    parts = [
        _open_part(cfg.data, source.info.prefix, source.parts[split], seq_length, seed, folder)
        for source, folder in zip(sources, prepared.folders, strict=False)
    ]
    weights = [source.weight for source in sources[: prepared.blended]]
    names = [source.info.prefix for source in sources]
    return BlendedSamples(parts, weights, seed, training, vocab_size, names)


def _open_part(data: DataConfig, prefix: str, part: SplitPart, seq_length: int, seed: int, folder: str) -> Any:
    """One epoch of one split of a data set, in the form that ``data`` asks for."""
    if data.packing == "best_fit":
        return open_packed(prefix, part, seq_length, folder, data)
    windows = open_split(prefix, part, seq_length, seed, folder)
    return DocumentSamples(windows, data) if data.tells_documents or data.eod_mask_loss else windows


DATASETS: dict[str, Builder] = {"indexed": _indexed}
