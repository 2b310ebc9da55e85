import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sgt.data.encoding import EncodedKey
from megatron_sgt.data.writer import DatasetWriter, Written, finish
from megatron_sgt.errors import DataError

LENGTHS = [3, 1, 4, 1, 5]


def piece(lengths: list[int], start: int, dtype: str = "int32") -> EncodedKey:
    tokens = np.arange(start, start + sum(lengths), dtype=dtype)
    return EncodedKey(tokens, np.array(lengths, dtype=np.int32), 0)


def files(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx")]


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_the_bytes_are_those_of_megatron(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    monkeypatch.setattr("megatron_sgt.data.writer._BLOCK", 2)  # several pieces of the index
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.dtype(dtype).type)
    with DatasetWriter(str(tmp_path / "ours"), dtype, overwrite=False) as writer:
        start = 0
        for length in LENGTHS:
            writer.add(piece([length], start, dtype))
            builder.add_document(torch.arange(start, start + length), [length])
            start += length
        writer.commit({"a": 1})
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert json.loads((tmp_path / "ours.json").read_text()) == {"documents": 5, "tokens": 14, "a": 1}


def test_it_goes_on_where_another_one_has_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    with DatasetWriter(whole, "int32", overwrite=False) as writer:
        writer.add(piece(LENGTHS, 0))
        writer.commit({})
    with DatasetWriter(cut, "int32", overwrite=False, keep=True) as writer:
        writer.add(piece(LENGTHS[:2], 0))
        writer.save()
        saved = writer.written
        writer.add(piece([9, 9], 77))  # is made again, and otherwise
    with DatasetWriter(cut, "int32", False, saved) as writer:
        writer.add(piece(LENGTHS[2:], 4))
        writer.commit({})
    assert files(tmp_path / "whole") == files(tmp_path / "cut")
    with (
        DatasetWriter(str(tmp_path / "less"), "int32", overwrite=False, keep=True),
        pytest.raises(DataError, match="another process is writing"),
    ):
        DatasetWriter(str(tmp_path / "less"), "int32", False, saved)

    def lock_late(*_: object) -> None:
        (tmp_path / "less.idx.tmp").rename(tmp_path / "less.idx")

    with monkeypatch.context() as patched, pytest.raises(DataError, match="another process is writing"):
        patched.setattr("fcntl.flock", lock_late)  # the other one commits meanwhile
        DatasetWriter(str(tmp_path / "less"), "int32", False, saved)
    (tmp_path / "less.idx").rename(tmp_path / "less.idx.tmp")
    with pytest.raises(DataError, match=r"less.bin.tmp has 0 bytes of 16 that .* without --resume"):
        DatasetWriter(str(tmp_path / "less"), "int32", False, saved)


def test_a_commit_is_finished_by_another_process(tmp_path: Path) -> None:
    whole = str(tmp_path / "whole")
    with DatasetWriter(whole, "int32", overwrite=False) as writer:
        writer.add(piece(LENGTHS, 0))
        writer.commit({})
    expected, written = files(tmp_path / "whole"), Written(5, 14)
    finish(whole, "int32", written, {})  # nothing is left to do
    for suffixes in ((".idx",), (".idx", ".json"), (".idx", ".json", ".bin")):
        for suffix in suffixes:
            Path(whole + suffix).rename(whole + suffix + ".tmp")
        finish(whole, "int32", written, {})
        assert files(tmp_path / "whole") == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.bin", "whole.idx", "whole.json"]
    Path(whole + ".idx").unlink()
    with pytest.raises(DataError, match=r"whole.idx is gone; start again without --resume"):
        finish(whole, "int32", written, {})
