"""The attended pairs of a run's data, measured from the lengths of its documents."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import Config
from megatron_sgt.config.phases import phases_of
from megatron_sgt.data.attended import attended
from megatron_sgt.data.indexed import sequence_lengths
from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.data.splits import split_parts
from megatron_sgt.errors import DataError

SAMPLED_DOCUMENTS = 1 << 20
"""Of a larger data set, runs of neighbouring documents evenly over it, so many in all."""
_RUNS = 64


def measured_pairs(config: Config) -> AttendedPairs | None:
    """Means over the training samples of ``data.data_path``, or of the blends of all phases by how much each reads.

    None where documents attend to each other. Pieces of packed samples (data.seq_length_curriculum) are taken as if
    their documents stood one after the other.

    Raises:
        DataError: a data set is missing or damaged, or has no training sample.
    """
    data, full = config.data, config.model.seq_length
    if not data.reset_attention_mask or data.dataset != "indexed":
        return None
    if not all(config.data_paths):
        raise DataError("data.data_path is empty; give the prefix of a .bin/.idx pair")
    lengths = {path: _lengths(config, path) for path in _read_from(config, None)}
    padding, of_length = 0.0, {}
    for length in config.seq_lengths.every:
        read = _read_from(config, length) or _read_from(config, None)
        packing = data.packing if length == full else "concat"
        of_length[length] = sum(
            weight * attended(lengths[path], length, packing, True).pairs for path, weight in read.items()
        )
    if data.packing != "concat":
        read = _read_from(config, None)
        padding = sum(
            weight * attended(lengths[path], full, data.packing, True).padding for path, weight in read.items()
        )
    return AttendedPairs(tuple(of_length.items()), padding)


def _read_from(config: Config, seq_length: int | None) -> dict[str, float]:
    """The share of each data set in the samples of the run, or in those of its phases of ``seq_length``."""
    whole = (config.model.seq_length, 1, config.data.data_path)
    phases = [(phase.seq_length, phase.samples, phase.data_path) for phase in phases_of(config)] or [whole]
    shares: Counter[str] = Counter()
    for length, samples, data_path in phases:
        if seq_length in (None, length):
            for weight, path in config.data.model_copy(update={"data_path": data_path}).blend():
                shares[path] += samples * weight
    return {path: share / shares.total() for path, share in shares.items()}


def _lengths(config: Config, path: str) -> np.ndarray:
    """Of the documents of the training split, or of a sample of them."""
    prefix, _ = resolve_prefix(path)
    lengths = sequence_lengths(prefix)
    part = split_parts(lengths, config.data.split_shares(), config.model.seq_length)[0]
    if part.tokens == 0:
        raise DataError(f"{prefix}: the training split (data.split {config.data.split}) has no token")
    documents = lengths[part.first : part.last]
    if len(documents) <= SAMPLED_DOCUMENTS:
        return documents
    size = SAMPLED_DOCUMENTS // _RUNS
    starts = np.linspace(0, len(documents) - size, _RUNS).astype(np.int64)
    return np.concatenate([documents[start : start + size] for start in starts])
