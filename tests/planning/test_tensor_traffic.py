"""Transfers, as arithmetic; the collectives that they stand for are counted in ``test_traffic.py``."""

from megatron_sgt.planning.tensor_traffic import Transfer, merged


def test_merging_adds_and_drops() -> None:
    one = Transfer("a", "tensor", "all_reduce", 8)
    assert merged([one, one.times(2), one.times(0)]) == (Transfer("a", "tensor", "all_reduce", 24, 3),)
    assert one.wire_bytes(4) == 12
    assert Transfer("a", "tensor", "all_gather", 8).wire_bytes(4) == 6
