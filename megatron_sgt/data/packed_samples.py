"""The samples of data.packing best_fit: sequences of whole documents, and padding after the last one."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megatron_sgt.config.data import DataConfig
from megatron_sgt.data.document_samples import describe_documents

PAD = 0
"""The token of the padding, and its label: the one id that every vocabulary has. No token attends to the padding and
its loss is masked, so any id gives the same numbers; a pad token of the tokenizer's own may lie outside the vocabulary
that the model has.
"""


class PackedSamples(Dataset[dict[str, Tensor]]):
    """One epoch of packed sequences, each once, as ``BlendedSamples`` describes samples.

    What follows a document in its sequence has nothing to do with it. The last token before the padding, or of a full
    sequence, predicts nothing, unless its document was cut there: then it predicts the token that comes next in the
    document.
    """

    def __init__(
        self, documents: Any, begins: np.ndarray, pieces: np.ndarray, seq_length: int, data: DataConfig
    ) -> None:
        """``documents``: Megatron's IndexedDataset; ``begins``, ``pieces``: as ``best_fit.pack`` returns them."""
        self._documents, self._begins, self._pieces = documents, begins, pieces
        self._seq_length, self._data = seq_length, data

    def __len__(self) -> int:
        return len(self._begins) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        size = self._seq_length
        text, at, goes_on = np.full(size + 1, PAD, np.int64), 0, False
        ends = []
        for document, number in self._pieces[self._begins[index] : self._begins[index + 1]].tolist():
            left = int(self._documents.sequence_lengths[document]) - number * size
            goes_on = left > size
            part = self._documents.get(document, offset=number * size, length=min(left, size + 1))
            text[at : at + len(part)] = part
            at += min(left, size)
            ends.append(at)
        counted = torch.ones(size)
        counted[at if goes_on else at - 1 :] = 0.0
        tokens = torch.from_numpy(text)
        sample = {
            "tokens": tokens[:-1].contiguous(),
            "labels": tokens[1:].contiguous(),
            "loss_mask": counted,
            "position_ids": torch.arange(size),
        }
        begins = ends[:-1] if at == size else ends
        describe_documents(sample, np.array(begins, np.int64), at, self._data)
        return sample
