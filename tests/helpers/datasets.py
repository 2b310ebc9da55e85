"""Indexed data sets for tests."""

from pathlib import Path

import numpy as np

from megatron_sgt.data.encoding import EncodedKey
from megatron_sgt.data.writer import DatasetWriter


def write_dataset(prefix: Path, lengths: list[int], start: int = 0, vocab_size: int = 1000) -> str:
    """A data set whose tokens count up from ``start``, modulo ``vocab_size``: every token tells its place."""
    tokens = ((np.arange(sum(lengths)) + start) % vocab_size).astype(np.uint16)
    with DatasetWriter(str(prefix), "uint16", overwrite=False) as writer:
        writer.add(EncodedKey(tokens, np.array(lengths, dtype=np.int32), 0))
        writer.commit({})
    return str(prefix)
