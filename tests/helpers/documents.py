"""Documents of small sequences, from their lengths."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sgt.ops.documents import Documents

LENGTH, VOCABULARY = 32, 128
"""Of the micro-batches that are made here."""
Place = tuple[int, int, int]
"""(sequence, begin, end) of a document."""


def starts_of(*lengths: Sequence[int]) -> Tensor:
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


def document_keys(parts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """``document_starts`` and ``num_tokens`` of sequences of LENGTH tokens; what ``parts`` leave of one is padding."""
    told = [sum(lengths) for lengths in parts]
    whole = [[*lengths, LENGTH - used] if used < LENGTH else lengths for lengths, used in zip(parts, told, strict=True)]
    return {"document_starts": starts_of(*whole), "num_tokens": torch.tensor(told, dtype=torch.int32)}


def random_sequences(size: int, length: int, seed: int) -> dict[str, Tensor]:
    """A micro-batch of random tokens, of whose loss nothing counts."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = (torch.randint(VOCABULARY, (size, length), generator=generator) for _ in range(2))
    positions = torch.arange(length).expand(size, -1)
    return {"tokens": tokens, "labels": labels, "loss_mask": torch.zeros(size, length), "position_ids": positions}


def observed_batch(parts: Sequence[Sequence[int]], observed: Sequence[Place], others: int) -> dict[str, Tensor]:
    """The loss of the documents ``observed`` counts; the contents of all others come from the seed ``others``."""
    size = len(parts)
    batch, content = random_sequences(size, LENGTH, others), random_sequences(size, LENGTH, 0)
    for row, begin, end in observed:
        for name in ("tokens", "labels"):
            batch[name][row, begin:end] = content[name][row, begin:end]
        batch["loss_mask"][row, begin:end] = 1.0
    return {**batch, **document_keys(parts)}
