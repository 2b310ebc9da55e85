import numpy as np
import pytest

from megatron_sgt.data.splits import split_bounds, split_parts


@pytest.mark.parametrize("split", ["949,50,1", "90,10,0", "1", "98,1,1", "0.7,0.2,0.1", "1,1,1"])
@pytest.mark.parametrize("num_sequences", [1, 2, 7, 19, 20, 731, 100_003])
def test_cuts_are_those_of_megatron(split: str, num_sequences: int) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    from megatron_sgt.config import DataConfig

    theirs = []
    for book_ends in convert_split_vector_to_split_matrix(parse_and_normalize_split(split)):
        low, high = book_ends or (0.0, 0.0)
        theirs.append((round(low * float(num_sequences)), round(high * float(num_sequences))))
    ours = split_bounds(num_sequences, DataConfig(split=split).split_shares())
    assert [high - low for low, high in ours] == [high - low for low, high in theirs]
    assert [cut for cut in ours if cut[0] < cut[1]] == [cut for cut in theirs if cut[0] < cut[1]]


def test_parts_count_tokens_and_whole_samples() -> None:
    lengths = np.array([10, 11, 12, 13, 14, 15, 16, 17, 1, 0], dtype=np.int32)
    train, valid, test = split_parts(lengths, (0.8, 0.1, 0.1), seq_length=9)
    assert (train.first, train.last, train.tokens, train.samples) == (0, 8, 108, (108 - 1) // 9)
    assert (valid.tokens, valid.samples) == (1, 0)
    assert (test.tokens, test.samples) == (0, 0)
