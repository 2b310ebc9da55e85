"""Counts of lengths, by hand."""

import numpy as np

from megatron_sgt.data.length_summary import Bucket, LengthSummary


def test_buckets_and_percentiles() -> None:
    lengths = np.array([0, 1, 1, 2, 3, 4, 7, 8, 0, 1000], np.int32)
    found = LengthSummary.of(lengths)
    assert (found.documents, found.tokens, found.empty, found.mean, found.longest) == (10, 1026, 2, 102.6, 1000)
    assert found.buckets == (
        Bucket(0, 0, 2, 0),
        Bucket(1, 1, 2, 2),
        Bucket(2, 3, 2, 5),
        Bucket(4, 7, 2, 11),
        Bucket(8, 15, 1, 8),
        Bucket(512, 1023, 1, 1000),
    )
    assert found.percentiles == {share: sorted(lengths)[9 * share // 100] for share in found.percentiles}
    lines = list(found.lines())
    assert "10, 2 of them empty" in lines[0] and "longest 1,000" in lines[2]
    assert len(lines) == 4 + len(found.buckets) and "97.5 %" in lines[-1]


def test_no_documents_and_tokens_beyond_32_bits() -> None:
    assert list(LengthSummary.of(np.zeros(0, np.int32)).lines()) == ["  documents  0", "  tokens     0"]
    found = LengthSummary.of(np.full(5, 2**31 - 1, np.int32))
    assert found.tokens == found.buckets[0].tokens == 5 * (2**31 - 1)
    assert found.buckets[0] == Bucket(2**30, 2**31 - 1, 5, found.tokens)
    assert LengthSummary.of(np.zeros(2, np.int32)).empty == 2
