"""The attended pairs of a run's data, measured from the lengths of its documents."""

from __future__ import annotations

from dataclasses import replace

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
    """Means over the training samples of every blend of the run; None where documents attend to each other.

    Pieces of packed samples (data.seq_length_curriculum) are taken as if their documents stood one after the other.

    Raises:
        DataError: a data set is missing or damaged, or has no training sample.
    """
    data = config.data
    if not data.reset_attention_mask or data.dataset != "indexed":
        return None
    if not data.data_path:
        raise DataError("data.data_path is empty; give the prefix of a .bin/.idx pair")
    of_blend = {path: _of_blend(config, path) for path in config.data_paths}
    later = tuple((phase.first, of_blend[phase.data_path]) for phase in phases_of(config))
    return replace(of_blend[data.data_path], later=later)


def _of_blend(config: Config, data_path: tuple[str, ...]) -> AttendedPairs:
    data, full = config.data.model_copy(update={"data_path": data_path}), config.model.seq_length
    blend = [(weight, _lengths(config, path)) for weight, path in data.blend()]
    whole = [(weight, attended(lengths, full, data.packing, True)) for weight, lengths in blend]
    of_length = {full: sum(weight * one.pairs for weight, one in whole)}
    for length in config.seq_lengths.every:
        if length != full:
            of_length[length] = sum(w * attended(lengths, length, "concat", True).pairs for w, lengths in blend)
    return AttendedPairs(tuple(of_length.items()), sum(weight * one.padding for weight, one in whole))


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
