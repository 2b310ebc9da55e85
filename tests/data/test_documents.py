"""The bounds of the tables in tests/edges/test_bad_documents.py."""

import pytest

from megatron_sgt.data.documents import MAX_DEPTH, BadDocument, BadDocuments, Chunk, parse
from megatron_sgt.errors import DataError


@pytest.mark.parametrize(("depth", "good"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_depth(depth: int, good: bool) -> None:
    line = b'{"text": "]\\"[", "m": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    (document,) = parse(Chunk("a", 1, [line]), ("text",))
    assert (document == (']"[',)) == good == (not isinstance(document, BadDocument))


def test_bad_ones_stand_in_their_places() -> None:
    first = BadDocument("b", "why")
    chunk = Chunk("a", 7, [b'{"text": "x"}', b" \n", b"{}", b'{"text": "y"}'], [first, ("w",)])
    found = list(parse(chunk, ("text",)))
    assert found[:3] == [first, ("w",), ("x",)] and found[4:] == [("y",)]
    assert isinstance(found[3], BadDocument) and found[3].where == "a:9"


def test_counts() -> None:
    one, two = BadDocument("a", "one"), BadDocument("b", "two")
    bad = BadDocuments(3)
    bad.add(0, None)
    assert bad.line(5) is None
    bad.add(1, one)
    bad.add(2, two)
    assert (bad.count, bad.first, bad.share(9)) == (3, one, 0.25)
    assert bad.line(9) == "3 bad documents left out, 25 % of 12; the first is a: one"
    with pytest.raises(DataError, match=r"^more than 3 bad documents \(--max-bad-documents\), the first is a: one; "):
        bad.add(1, two)
    with pytest.raises(DataError, match=r"^b: two; correct it, or leave out up to N"):
        BadDocuments().add(1, two)
