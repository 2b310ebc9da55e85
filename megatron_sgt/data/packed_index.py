"""The packing of a split on disk: two files, mapped by every process. No torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_sgt.data.best_fit import pack
from megatron_sgt.data.splits import SplitPart

VERSION = 1
"""Changes with the order that ``pack`` gives: sample indices of another version are not those of a run that goes on."""


def save_packing(folder: str, part: SplitPart, lengths: np.ndarray, seq_length: int, seed: int) -> None:
    """Pack the documents of ``part``, of a data set with ``lengths`` (int32 [documents]), into files in ``folder``."""
    begins, pieces = pack(lengths[part.first : part.last], seq_length, seed)
    pieces[:, 0] += part.first
    np.save(_path(folder, part, "begins"), begins)
    np.save(_path(folder, part, "pieces"), pieces)


def open_packing(folder: str, part: SplitPart) -> tuple[np.ndarray, np.ndarray]:
    """``begins`` and ``pieces`` as ``best_fit.pack`` describes them, with the numbers of documents in the data set."""
    begins, pieces = (
        np.load(_path(folder, part, name), mmap_mode="r", allow_pickle=False) for name in ("begins", "pieces")
    )
    return begins, pieces


def _path(folder: str, part: SplitPart, name: str) -> Path:
    return Path(folder) / f"best_fit-{part.name}-{name}.npy"
