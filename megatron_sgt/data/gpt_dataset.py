"""The samples that a run trains on, in an order that depends only on (seed, sample index).

Megatron shuffles all epochs of a run together, so another ``train_iters`` gives another order. Here each
data set is a GPTDataset of exactly one epoch; epoch e of data set d is that epoch under a permutation keyed
by (seed, d, e); and ``Blend`` says which data set sample i is drawn from.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset

from megatron_sgt import extensions
from megatron_sgt.config.root import Config
from megatron_sgt.data.blend import Blend
from megatron_sgt.data.document_samples import DocumentSamples, check_documents
from megatron_sgt.data.index_cache import EVAL_SEED, build_index_cache, open_split, wait_for_folder
from megatron_sgt.data.permutation import RandomPermutation
from megatron_sgt.data.sources import Source, find_sources, find_validation_sets
from megatron_sgt.data.splits import SPLIT_NAMES
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
    """An endless sequence of samples: ``samples[i]`` for any i >= 0, in constant time and memory.

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
        """``parts``: one epoch of each data set; ``shuffle``: a new order every epoch, or always theirs."""
        self.parts = list(parts)
        self.names = list(names)
        self._blend = Blend(weights)
        self._seed = seed
        self._shuffle = shuffle
        self._vocab_size = vocab_size
        self._orders: dict[int, tuple[int, RandomPermutation]] = {}

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def locate(self, index: int) -> tuple[int, int]:
        """(d, j): sample ``index`` is element j of ``parts[d]``. A function of seed and index alone."""
        if index < 0:
            raise IndexError(f"sample index {index} is negative")
        d, drawn = self._blend[index]
        epoch, position = divmod(drawn, len(self.parts[d]))
        if not self._shuffle:
            return d, position
        known = self._orders.get(d)
        if known is None or known[0] != epoch:
            known = (epoch, RandomPermutation(len(self.parts[d]), (self._seed, d, epoch)))
            self._orders[d] = known
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


@dataclass(frozen=True)
class _Prepared:
    """What rank 0 found and built, for all ranks to open."""

    sources: tuple[Source, ...]
    folders: tuple[str, ...]


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
        DataError: on every rank, for whatever ``find_sources`` refuses.
    """
    vocab_size = resolve_vocab_size(cfg.model.vocab_size, tokenizer)
    prepared = on_rank_zero(lambda: _prepare(cfg, find_sources(cfg, tokenizer), cfg.train.seed))
    _await(prepared)
    train = _open(cfg, prepared, 0, vocab_size)
    assert train is not None, "find_sources refuses data without a training sample"
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
    sets = find_validation_sets(cfg, tokenizer)
    return {name: _prepare(cfg, (source,), EVAL_SEED) for name, source in sets.items()}


def _prepare(cfg: Config, sources: tuple[Source, ...], seed: int) -> _Prepared:
    seq_length, root = cfg.model.seq_length, str(cfg.data_cache_dir)
    folders = tuple(
        build_index_cache(s.info.prefix, s.parts, s.info.lengths_digest, seq_length, seed, root) for s in sources
    )
    return _Prepared(sources, folders)


def _await(prepared: _Prepared) -> None:
    """Say what was assumed, and wait until this rank sees what rank 0 has built."""
    for note in (source.note for source in prepared.sources if source.note):
        logger.info(note)
    for folder in prepared.folders:
        wait_for_folder(folder)


def _open(cfg: Config, prepared: _Prepared, split: int, vocab_size: int) -> BlendedSamples | None:
    sources = prepared.sources
    if any(source.parts[split].samples == 0 for source in sources):
        return None
    seq_length, seed = cfg.model.seq_length, cfg.train.seed
    parts = [
        open_split(source.info.prefix, source.parts[split], seq_length, seed, folder)
        for source, folder in zip(sources, prepared.folders, strict=True)
    ]
    if cfg.data.tells_documents or cfg.data.eod_mask_loss:
        parts = [DocumentSamples(part, cfg.data) for part in parts]
    weights = [source.weight for source in sources]
    names = [source.info.prefix for source in sources]
    return BlendedSamples(parts, weights, seed, SPLIT_NAMES[split] == "train", vocab_size, names)


DATASETS: dict[str, Builder] = {"indexed": _indexed}
