import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sgt.data.indexed import check_indexed_dataset, content_digest, read_metadata, sequence_lengths
from megatron_sgt.errors import DataError
from tests.helpers.datasets import write_dataset


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "corpus_text_document", [3, 1, 4, 1, 5])


def test_info_agrees_with_megatron(prefix: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    info = check_indexed_dataset(prefix, vocab_size=1000)
    theirs = IndexedDataset(prefix)
    assert (info.sequences, info.documents, info.tokens) == (
        len(theirs),
        len(theirs.document_indices) - 1,
        14,
    )
    assert info.dtype == "uint16"
    assert sequence_lengths(prefix).tolist() == theirs.sequence_lengths.tolist() == [3, 1, 4, 1, 5]


def test_digest_follows_the_lengths(prefix: str, tmp_path: Path) -> None:
    digest = check_indexed_dataset(prefix).lengths_digest
    same = write_dataset(tmp_path / "same", [3, 1, 4, 1, 5], start=7)
    other = write_dataset(tmp_path / "other", [3, 1, 4, 2, 4])
    assert check_indexed_dataset(same).lengths_digest == digest
    assert check_indexed_dataset(other).lengths_digest != digest


def test_the_digest_of_the_content_tells_equal_lengths_apart(tmp_path: Path) -> None:
    one, other = (write_dataset(tmp_path / str(start), [300, 500], start) for start in (0, 1))
    longer = write_dataset(tmp_path / "longer", [300, 500, 7])
    assert content_digest(one, 800) != content_digest(other, 800)
    assert content_digest(longer, 800) == content_digest(one, 800) != content_digest(longer, 807)
    assert content_digest(one, 0) == content_digest(other, 0)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".bin", lambda b: b[:-2], r"\.bin is truncated: it has 26 bytes, its index describes 28"),
        (".bin", lambda b: b + b"xx", r"do not belong together"),
        (".idx", lambda b: b[:-8], r"\.idx is truncated"),
        (".idx", lambda b: b[:20], r"not a Megatron index"),
        (".idx", lambda b: b"PAR1" + b[4:], r"not a Megatron index.*PAR1"),
        (".idx", lambda b: b[:9] + b"\x02" + b[10:], r"version 2"),
        (".idx", lambda b: b[:17] + b"\x63" + b[18:], r"dtype code 99"),
        (".idx", lambda b: b[:-8] + b"\x09" + b[-7:], r"damaged"),
    ],
)
def test_damage_is_found(prefix: str, suffix: str, change: object, message: str) -> None:
    file = Path(prefix + suffix)
    file.write_bytes(change(file.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        check_indexed_dataset(prefix)


def test_ids_outside_the_vocabulary(prefix: str) -> None:
    check_indexed_dataset(prefix, vocab_size=14)
    with pytest.raises(DataError, match=r"token id 13, but the vocabulary has 13 ids"):
        check_indexed_dataset(prefix, vocab_size=13)


@pytest.mark.parametrize("place", [0, 1, 499, 500, 998, 999])
def test_every_id_of_a_small_set_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr("megatron_sgt.data.indexed._WINDOW", 64)
    prefix = write_dataset(tmp_path / "x", [1000], vocab_size=10)
    tokens = np.fromfile(prefix + ".bin", dtype=np.uint16)
    tokens[place] = 77
    tokens.tofile(prefix + ".bin")
    with pytest.raises(DataError, match="token id 77"):
        check_indexed_dataset(prefix, vocab_size=10)


def test_large_sets_are_sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sgt.data.indexed._WINDOW", 8)
    monkeypatch.setattr("megatron_sgt.data.indexed.CHECKED_TOKENS", 32)
    prefix = write_dataset(tmp_path / "x", [1000], vocab_size=10)
    tokens = np.fromfile(prefix + ".bin", dtype=np.uint16)
    tokens[-1] = 77  # the end is always in the sample
    tokens.tofile(prefix + ".bin")
    with pytest.raises(DataError, match="token id 77"):
        check_indexed_dataset(prefix, vocab_size=10)


def test_another_tokenizer(prefix: str) -> None:
    Path(prefix + ".json").write_text(json.dumps({"tokenizer": "sp a.model", "tokenizer_fingerprint": "aa"}))
    check_indexed_dataset(prefix, tokenizer_fingerprint="aa")
    with pytest.raises(DataError, match=r"was tokenized with sp a\.model .*data\.tokenizer is another one"):
        check_indexed_dataset(prefix, tokenizer_fingerprint="bb")
    Path(prefix + ".json").unlink()
    assert read_metadata(prefix) == {}
    check_indexed_dataset(prefix, tokenizer_fingerprint="bb")
    Path(prefix + ".json").write_text("{")
    with pytest.raises(DataError, match=r"\.json is damaged"):
        check_indexed_dataset(prefix)


def test_documents_that_begin_otherwise(prefix: str) -> None:
    Path(prefix + ".json").unlink(missing_ok=True)
    check_indexed_dataset(prefix, add_bos=True)  # of Megatron's own data sets nothing is known
    for noted, wanted, message in (
        (
            {"tokenizer": "an old one"},
            True,
            "do not begin with .* is true: set it to false, or .* again with --add-bos",
        ),
        ({"add_bos": True}, False, "begin with .* is false: set it to true, or .* again without --add-bos"),
    ):
        Path(prefix + ".json").write_text(json.dumps(noted))
        check_indexed_dataset(prefix, add_bos=not wanted)
        with pytest.raises(DataError, match=message):
            check_indexed_dataset(prefix, add_bos=wanted)
