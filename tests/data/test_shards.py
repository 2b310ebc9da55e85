"""Property: whatever the files and the number of shards, the shards in order are the input."""

import gzip
import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sgt.data.documents import BadDocument, parse
from megatron_sgt.data.inputs import InputFile, find_inputs
from megatron_sgt.data.readers import read_chunks
from megatron_sgt.data.shards import Shard, files_of


def lines(draw: random.Random, count: int) -> bytes:
    """Of very different lengths; some blank, one bad, and perhaps without an end."""
    texts = [json.dumps({"text": f"{i} " + "x" * draw.choice([0, 3, 40, 700])}) for i in range(count)]
    texts[draw.randrange(count)] = "bad"
    return ("\n\n".join(texts) + "\n" * draw.randrange(2)).encode()


def documents(files: tuple[InputFile, ...]) -> list[str]:
    found = [document for chunk in read_chunks(files, chunk_bytes=100) for document in parse(chunk, ("text",))]
    return [str(document) if isinstance(document, BadDocument) else document[0] for document in found]


@pytest.mark.parametrize("seed", range(4))
def test_the_shards_are_the_input(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_sgt.data.readers._ROWS", 3)  # a row group is read in several pieces
    draw = random.Random(seed)
    for i in range(draw.randrange(1, 3)):
        (tmp_path / f"a{i}.jsonl").write_bytes(lines(draw, draw.randrange(1, 60)))
    if seed % 2:
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(draw, 30)))
        rows = pyarrow.table({"text": [f"row {i}" for i in range(97)]})
        pyarrow.parquet.write_table(rows, tmp_path / "c.parquet", row_group_size=20)
        (tmp_path / "d.txt").write_text("a text")
        for name in ("a.txt", "e.txt", "z.txt"):
            (tmp_path / name).touch()
    files = find_inputs([str(tmp_path)]).files
    whole = documents(files)
    assert any("bad" in document or "not a JSON" in document for document in whole)
    for count in (1, 2, 3, 7, 50):
        parts = [documents(files_of(Shard(i, count), files)) for i in range(count)]
        assert [document for part in parts for document in part] == whole, "with the numbers of lines, too"


def test_one_large_file_is_divided_evenly(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 1000)
    files = find_inputs([str(tmp_path)]).files
    counts = [len(documents(files_of(Shard(i, 7), files))) for i in range(7)]
    assert sum(counts) == 1000 and max(counts) - min(counts) <= 1
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 2)
    files = find_inputs([str(tmp_path)]).files
    assert sum(len(documents(files_of(Shard(i, 40), files))) for i in range(40)) == 2, "more shards than bytes"


def test_names() -> None:
    assert (str(Shard(3, 64)), Shard(3, 64).prefix("a/c4")) == ("3/64", "a/c4-00003-of-00064")
