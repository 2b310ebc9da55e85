"""What the data of a run is: its files, how samples are made of them, and some of these samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from megatron_sgt.config import Config
from megatron_sgt.config.loader import parse_config, with_overrides
from megatron_sgt.data.attended import attended
from megatron_sgt.data.gpt_dataset import DATASETS, build_datasets
from megatron_sgt.data.indexed import read_metadata, sequence_lengths
from megatron_sgt.data.length_summary import LengthSummary
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.data.sample_view import SampleView, segments
from megatron_sgt.data.sources import Source, find_sources
from megatron_sgt.data.splits import SPLIT_NAMES, SplitPart
from megatron_sgt.data.tokenizer import Tokenizer, tokenizer_of
from megatron_sgt.errors import DataError

_LENGTH = 1024
"""Of a sample where no run says it, or less where the data set is smaller."""
_SETTINGS = ("packing", "reset_attention_mask", "reset_position_ids", "eod_mask_loss", "split")


@dataclass(frozen=True)
class PartView:
    """A split of a data set.

    ``padding``: share of its samples' tokens; ``attended``: share of the pairs of query and key that attention without
    documents computes. Both are None where there is no sample.
    """

    split: str
    documents: int
    tokens: int
    samples: int
    padding: float | None
    attended: float | None

    def line(self) -> str:
        """For a person."""
        text = f"  {self.split:<9}  {self.documents:,} documents · {self.tokens:,} tokens · {self.samples:,} samples"
        if self.padding is None or self.attended is None:
            return text
        return (
            f"{text} · padding {100 * self.padding:.2f} % · attends to {100 * self.attended:.1f} % of the causal pairs"
        )


@dataclass(frozen=True)
class FileView:
    """One .bin/.idx pair. ``made_with``: the tokenizer that its .json names."""

    prefix: str
    weight: float
    dtype: str
    made_with: str | None
    lengths: LengthSummary
    splits: tuple[PartView, ...]

    def lines(self) -> Iterator[str]:
        """For a person."""
        made = "" if self.made_with is None else f", tokenized with {self.made_with}"
        weight = "" if self.weight == 1 else f", weight {self.weight:.4g}"
        yield f"{self.prefix}: {self.dtype}{made}{weight}"
        yield from self.lengths.lines()
        yield from (part.line() for part in self.splits if part.documents)


@dataclass(frozen=True)
class Inspection:
    """All of it. ``settings``: those that decide what the samples are."""

    settings: dict[str, Any]
    files: tuple[FileView, ...]
    samples: tuple[SampleView, ...]

    def lines(self) -> Iterator[str]:
        """For a person."""
        for file in self.files:
            yield from file.lines()
        yield "settings: " + " · ".join(f"{name} {str(value).lower()}" for name, value in self.settings.items())
        for sample in self.samples:
            yield ""
            yield from sample.lines()


def assumed_config(prefix: str, overrides: list[str]) -> Config:
    """The settings under which a data set is shown that no run reads: all of it, with documents kept apart.

    Raises:
        ConfigError: a bad override. DataError: there is no such data set, or its index is damaged.
    """
    tokens = int(sequence_lengths(resolve_prefix(prefix)[0]).sum(dtype="int64"))
    values: dict[str, Any] = {
        "model": {
            "num_layers": 1, "hidden_size": 2, "num_attention_heads": 1,
            "seq_length": max(2, min(_LENGTH, tokens - 1)), "vocab_size": 2**31 - 1,
        },
        "growth": {"method": "vanilla"},
        "optim": {"lr": 1.0},
        "train": {"train_iters": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "data": {
            "data_path": [prefix], "split": "1", "reset_attention_mask": True, "reset_position_ids": True,
            "eod_mask_loss": True,
        },
    }  # fmt: skip
    values = with_overrides(values, overrides)
    if values["data"].get("tokenizer") is not None:
        values["model"]["vocab_size"] = None
    return parse_config(values, "the settings to show the data with")


def inspect(config: Config, split: str, first: int, count: int) -> Inspection:
    """Read the data of ``config`` and ``count`` samples of ``split``, from number ``first`` on.

    Their indices are built where ``data.data_cache_path`` says, or in a folder that does not stay.

    Raises:
        DataError: as a run with this configuration would; the split holds no sample.
    """
    tokenizer = tokenizer_of(config.data)
    sources = find_sources(config, tokenizer) if config.data.dataset in DATASETS else ()
    settings = {"seq_length": config.model.seq_length} | {name: getattr(config.data, name) for name in _SETTINGS}
    samples: tuple[SampleView, ...] = ()
    if count:
        with TemporaryDirectory() as folder:
            samples = tuple(_samples(_cached(config, folder), tokenizer, split, range(first, first + count)))
    return Inspection(settings, tuple(_file(source, config) for source in sources), samples)


def _file(source: Source, config: Config) -> FileView:
    lengths, metadata = sequence_lengths(source.info.prefix), read_metadata(source.info.prefix)
    return FileView(
        source.info.prefix,
        source.weight,
        source.info.dtype,
        metadata.get("tokenizer"),
        LengthSummary.of(lengths),
        tuple(_part(part, lengths[part.first : part.last], config) for part in source.parts),
    )


def _part(part: SplitPart, lengths: np.ndarray, config: Config) -> PartView:
    size, data = config.model.seq_length, config.data
    found = None if part.samples == 0 else attended(lengths, size, data.packing, data.reset_attention_mask)
    return PartView(
        part.name,
        part.last - part.first,
        part.tokens,
        part.samples,
        None if found is None else found.padding,
        None if found is None else found.pairs / (size * (size + 1) / 2),
    )


def _cached(config: Config, folder: str) -> Config:
    if config.data.data_cache_path is not None:
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"data_cache_path": folder})})


def _samples(config: Config, tokenizer: Tokenizer | None, split: str, numbers: range) -> Iterator[SampleView]:
    samples = build_datasets(config, tokenizer)[SPLIT_NAMES.index(split)]
    if samples is None:
        raise DataError(f"the {split} split (data.split {config.data.split}) holds no sample; choose another --split")
    for number in numbers:
        yield SampleView(number, segments(samples[number], config.data.reset_attention_mask, tokenizer))
