"""Runs over data sets of which every token tells its place, under settings that change from one to the next."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sgt.config import Config
from megatron_sgt.data.changes import Change, find_change
from megatron_sgt.data.gpt_dataset import BlendedSamples, build_datasets, follow
from megatron_sgt.data.history import DataOrder, grown_files, order_of
from megatron_sgt.data.index_cache import build_index_cache
from megatron_sgt.data.ledger import Begins, Ledger, Span
from tests.helpers.datasets import write_dataset
from tests.helpers.runs import tiny_config

VOCABULARY = 65_000
"""More than all tokens of the data sets here, so that every token tells its place."""


def lengths(number: int, seed: int) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(1, 70, number)]


LENGTHS = {"a": lengths(90, 1), "b": lengths(60, 2), "longer": [*lengths(90, 1), *lengths(40, 3)], "c": lengths(80, 4)}
STARTS = {"a": 0, "longer": 0, "b": 20_000, "c": 40_000}
"""The first token of each data set: ``longer`` is ``a`` with documents appended."""


def write_data_sets(made: Path) -> Path:
    """All of ``LENGTHS`` in ``made``, and ``moved``, a copy of ``a``; returns the folder."""
    for name, each in LENGTHS.items():
        write_dataset(made / name, each, STARTS[name], VOCABULARY)
    for suffix in (".bin", ".idx"):
        shutil.copy(made / f"a{suffix}", made / f"moved{suffix}")
    return made


def real(sample: dict[str, Any]) -> list[int]:
    """The tokens of a sample without its padding."""
    return sample["tokens"].tolist()[: sample.get("num_tokens")]


@dataclass
class Data:
    """Settings of a run over the data sets of a folder."""

    folder: Path
    path: tuple[str, ...] = ("a",)
    seq_length: int = 16
    seed: int = 7
    split: str = "80,20,0"
    batch: int = 8
    packing: str = "concat"

    def config(self) -> Config:
        paths = [part if part[0].isdigit() else str(self.folder / part) for part in self.path]
        return tiny_config(
            self.folder / "run",
            "",
            model={"seq_length": self.seq_length, "vocab_size": VOCABULARY},
            train={
                "seed": self.seed,
                "train_iters": self.batch,
                "global_batch_size": self.batch,
                "eval_interval": 0 if self.split == "100,0,0" else 5,
            },
            data={
                "data_path": paths,
                "split": self.split,
                "data_cache_path": str(self.folder / "cache"),
                "packing": self.packing,
                "reset_attention_mask": self.packing == "best_fit",
            },
        )

    def order(self) -> DataOrder:
        return order_of(self.config())

    def samples(self, span: Span | None = None) -> BlendedSamples:
        made = build_datasets(self.config(), None)[0]
        if span is not None:
            follow(made, span, self.config())
        return made

    def tokens(self, start: int, stop: int, span: Span | None = None) -> Counter[int]:
        """How often each token is read by the samples number start .. stop - 1."""
        samples = self.samples(span)
        return Counter(t for i in range(start, stop) for t in real(samples[i]))

    def ledger(self, *earlier: tuple[Data, int]) -> Ledger:
        """After runs that have read up to sample n each, one after the other."""
        made, start = Ledger(()), 0
        for data, stop in (*earlier, (self, 0)):
            made = made.turned(data.order(), start, every_begins(self.folder))
            start = stop
        return made

    def change(self, *earlier: tuple[Data, int]) -> Change | None:
        """What this one makes of them."""
        ledger, consumed = self.ledger(*earlier), earlier[-1][1]
        before = earlier[-1][0].ledger(*earlier[:-1]).until(consumed)
        return find_change(before, ledger.now, every_begins(self.folder), self.indices)

    def indices(self, *wanted: Any) -> str:
        *about, packing = wanted
        return build_index_cache(*about, str(self.folder / "cache"), packing)


@cache
def every_begins(folder: Path) -> Begins:
    files = [Data(folder, (name,)).order().files[0] for name in LENGTHS]
    return grown_files(files, files)
