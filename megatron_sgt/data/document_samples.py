"""What samples say of their documents, from the indices of the data set: never from the values of tokens.

An end-of-document token is no boundary: a data set may lack it, and a text may hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_sgt.config.data import DataConfig
from megatron_sgt.errors import DataError

DOCUMENT_KEYS = ("document_starts", "num_tokens")


def document_begins(
    sample_index: np.ndarray, document_index: np.ndarray, lengths: np.ndarray, window: int
) -> np.ndarray:
    """Where documents begin in a window of GPTDataset, but for its first token: ascending int64 in 1 .. T.

    A window is T + 1 tokens, the last of which is the next window's first one. ``T`` means that only this last token,
    a label, belongs to another document. Documents without tokens begin where the next one does.

    Args:
        sample_index: [windows + 1, 2], (place in ``document_index``, offset in that document) of each first token.
        document_index: the documents as they were shuffled.
        lengths: [documents], tokens of each.
    """
    (first, offset), (last, _) = sample_index[window], sample_index[window + 1]
    sizes = lengths[document_index[first:last]].astype(np.int64)
    begins = np.cumsum(sizes) - int(offset)
    return begins[begins > 0]


def describe_documents(sample: dict[str, Tensor], begins: np.ndarray, num_tokens: int, data: DataConfig) -> None:
    """Add to ``sample`` what the settings of ``data`` ask for.

    Args:
        sample: ``tokens`` [T], and ``loss_mask`` and ``position_ids`` as they are without documents.
        begins: as ``document_begins`` returns them; padding begins as a document does.
        num_tokens: the tokens before the padding.
    """
    size = len(sample["tokens"])
    if data.eod_mask_loss:
        counted = sample["loss_mask"].clone()  # GPTDataset keeps and returns one tensor
        counted[torch.from_numpy(begins) - 1] = 0.0
        sample["loss_mask"] = counted
    if not data.tells_documents:
        return
    starts = np.zeros(size, np.int32)
    inside = begins[begins < size]
    starts[inside] = inside
    starts = np.maximum.accumulate(starts)
    sample["document_starts"] = torch.from_numpy(starts)
    sample["num_tokens"] = torch.tensor(num_tokens, dtype=torch.int32)
    if data.reset_position_ids:
        sample["position_ids"] = torch.arange(size) - sample["document_starts"]


class DocumentSamples(Dataset[dict[str, Tensor]]):
    """One epoch of a GPTDataset whose samples say where their documents begin, and which labels count."""

    def __init__(self, windows: Any, data: DataConfig) -> None:
        self._windows, self._data = windows, data

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        windows = self._windows
        sample = dict(windows[index])
        begins = document_begins(
            windows.sample_index,
            windows.document_index,
            windows.dataset.sequence_lengths,
            int(windows.shuffle_index[index]),
        )
        describe_documents(sample, begins, len(sample["tokens"]), self._data)
        return sample


def check_documents(sample: Mapping[str, Tensor], name: str) -> None:
    """Refuse samples of the registered data set ``name`` that do not say where documents begin.

    Raises:
        DataError: one of ``DOCUMENT_KEYS`` is missing, or has another shape or type.
    """
    shapes = {"document_starts": tuple(sample["tokens"].shape), "num_tokens": ()}
    for key, shape in shapes.items():
        found = sample.get(key)
        if found is None or tuple(found.shape) != shape or found.dtype != torch.int32:
            what = "no" if found is None else f"{tuple(found.shape)} {str(found.dtype).removeprefix('torch.')} as"
            raise DataError(
                f"data.dataset: the samples of '{name}' have {what} {key}, int32 of shape {shape}, which "
                "data.reset_attention_mask and data.reset_position_ids need; let it provide them (extending.md), or "
                "leave these settings out"
            )
