"""Documents of small sequences, from their lengths."""

import itertools
from collections.abc import Sequence

import torch

from megatron_sgt.ops.documents import Documents


def starts_of(*lengths: Sequence[int]) -> torch.Tensor:
    """[B, S] int32 from the lengths of the documents of each sequence."""
    begins = [[0, *itertools.accumulate(parts)][:-1] for parts in lengths]
    rows = zip(begins, lengths, strict=True)
    return torch.stack([torch.tensor(row).repeat_interleave(torch.tensor(parts)) for row, parts in rows]).int()


def documents_of(
    *lengths: Sequence[int], padding: Sequence[int] | None = None, device: torch.device | str = "cpu"
) -> Documents:
    """Documents of these lengths; ``padding``: for each sequence, how many of its last tokens are padding."""
    starts = starts_of(*lengths)
    unused = torch.tensor(padding or [0] * len(lengths), dtype=torch.int32)
    documents = Documents.of(starts, starts.shape[1] - unused, device)
    assert documents is not None, "every sequence is one document"
    return documents
