"""The documents of a micro-batch: where they begin and end, on the host and as tensors."""

import torch

from megatron_sgt.ops.documents import Documents

STARTS = torch.tensor([[0, 0, 2, 2, 2, 5], [0, 0, 0, 0, 4, 4]], dtype=torch.int32)


def test_documents_of_two_sequences_the_second_padded():
    documents = Documents.of(STARTS, torch.tensor([6, 4], dtype=torch.int32))
    assert documents is not None
    assert documents.lengths == ((2, 3, 1), (4, 2)) and documents.num_tokens == (6, 4)
    assert documents.ends.tolist() == [[2, 2, 5, 5, 5, 6], [4, 4, 4, 4, 6, 6]]
    assert documents.last.tolist() == [5, 3]
    assert documents.offsets.tolist() == [0, 2, 5, 6, 10, 12] and documents.offsets.dtype == torch.int32
    assert documents.longest == 4
    assert documents.pairs == 3 + 6 + 1 + 10 + 3


def test_one_document_per_sequence_is_none_unless_it_is_padded():
    one = torch.zeros(2, 4, dtype=torch.int32)
    assert Documents.of(one, torch.tensor([4, 4], dtype=torch.int32)) is None
    assert Documents.of(one, torch.tensor([4, 3], dtype=torch.int32)) is not None


def test_shares_of_the_last_positions():
    """A rank of a balanced loop holds the last queries of the first keys."""
    documents = Documents.of(STARTS, torch.tensor([6, 4], dtype=torch.int32))
    assert documents is not None
    assert documents.shares(6, 6) == [[(2, 2), (3, 3), (1, 1)], [(4, 4), (2, 2)]]
    assert documents.shares(2, 4) == [[(0, 2), (2, 2)], [(2, 4)]]
    assert documents.shares(2, 6) == [[(0, 2), (1, 3), (1, 1)], [(0, 4), (2, 2)]]
