import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_sgt.data.documents import BadDocument, parse
from megatron_sgt.data.inputs import find_inputs
from megatron_sgt.data.readers import read_chunks
from megatron_sgt.errors import DataError

TEXTS = ["first", "", "zweites é 漢\n\nText", "x" * 5000, "last\r\n"]
PACK = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}
PACK["zstd"], PACK["lzma"] = PACK["zst"], lambda content: lzma.compress(content, lzma.FORMAT_ALONE)


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    """Of two frames where it is compressed, as parallel compressors write them."""
    content = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)).encode()
    if pack := PACK.get(path.suffix[1:].lower()):
        half = len(content) // 2
        content = b"".join(pack(part) for part in (content[:half], b"", content[half:]))
    path.write_bytes(content)
    return path


def documents(*inputs: object, **options: object) -> list[str]:
    files = find_inputs([str(name) for name in inputs], options.pop("kind", None)).files  # type: ignore[arg-type]
    chunks = list(read_chunks(files, **options))  # type: ignore[arg-type]
    assert [c.bytes_read for c in chunks] == sorted(c.bytes_read for c in chunks)
    if chunks:
        assert chunks[-1].bytes_read == sum(file.path.stat().st_size for file in files)
    found = [document for chunk in chunks for document in parse(chunk, ("text",))]
    return [str(document) if isinstance(document, BadDocument) else document[0] for document in found]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", *(f"a.jsonl.{suffix}" for suffix in PACK)])
@pytest.mark.parametrize("chunk_bytes", [1, 50, 1 << 20])
def test_jsonl(tmp_path: Path, name: str, chunk_bytes: int) -> None:
    assert documents(write_jsonl(tmp_path / name), chunk_bytes=chunk_bytes) == TEXTS


def test_blank_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"text": "a"}\n  \n{"text": "b"}')
    assert documents(tmp_path / "a.jsonl") == ["a", "b"]


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"id": list(range(1000)), "text": [f"row {i}" for i in range(1000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    assert documents(tmp_path / "a.parquet") == [f"row {i}" for i in range(1000)]
    with pytest.raises(DataError, match=r"no column 'body', only \['id', 'text'\]"):
        list(read_chunks(find_inputs([str(tmp_path / "a.parquet")]).files, ("body",)))
    with pytest.raises(DataError, match=r"column 'id' holds int64, not text"):
        list(read_chunks(find_inputs([str(tmp_path / "a.parquet")]).files, ("id",)))


def test_text_keeps_every_character(tmp_path: Path) -> None:
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    assert documents(tmp_path) == TEXTS
    (tmp_path / "5.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert documents(tmp_path) == [*TEXTS, "packed"]


def test_folder_is_searched_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "b" / "z.jsonl", ["3"])
    write_jsonl(tmp_path / "a.jsonl.gz", ["1"])
    (tmp_path / "b" / "a.txt").write_text("2")
    (tmp_path / "README").write_text("not data")
    (tmp_path / ".hidden.txt").write_text("not data")
    assert documents(tmp_path) == ["1", "2", "3"]
    assert documents(tmp_path / "b", tmp_path / "README") == ["2", "3", "not data"]


def test_format_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "data.out").write_text('{"text": "a"}\n')
    assert documents(tmp_path / "data.out", kind="jsonl") == ["a"]
    assert documents(tmp_path, kind="jsonl") == ["a"]
    assert documents(tmp_path / "data.out") == ['{"text": "a"}\n']


def test_bad_lines_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for line, message in [
        ('{"text": "a"', r"a\.jsonl:4: not a JSON line"),
        ("[1]", r"a\.jsonl:4: expected a JSON object, got list"),
        (
            '{"body": "a", "id": 1}',
            r"a\.jsonl:4: .*key 'text', got keys \['body', 'id'\]; choose with --json-keys",
        ),
        ('{"text": null}', r"a\.jsonl:4: .*got a NoneType"),
    ]:
        path.write_text('{"text": "ok"}\n\n{"text": "ok"}\n' + line + "\n")
        for chunk_bytes in (1, 1000):
            assert re.search(message, documents(path, chunk_bytes=chunk_bytes)[-1])
    path.write_bytes(b'{"text": "\xff"}\n')
    assert documents(path)[0].startswith(f"{path}:1: not a JSON line: not UTF-8: ")


@pytest.mark.parametrize("name", [f"a.jsonl.{suffix}" for suffix in PACK])
def test_damaged_archives(tmp_path: Path, name: str) -> None:
    path = write_jsonl(tmp_path / name, [str(i) * 50 for i in range(2000)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        documents(path)
    path.write_bytes(content + b"this is no archive" * 10)
    with pytest.raises(DataError, match=f"cannot read .*{name}"):
        documents(path)


def test_unusable_inputs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        find_inputs([str(tmp_path / "nowhere")])
    (tmp_path / "a.csv").write_text("1")
    with pytest.raises(DataError, match=r"no input files in .*: it holds 1 \.csv; read are \.jsonl"):
        find_inputs([str(tmp_path)])
    (tmp_path / "a.txt").write_bytes(b"\xff\xfa")
    assert documents(tmp_path / "a.txt")[0].startswith(f"{tmp_path}/a.txt: not UTF-8 text: ")
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"not a parquet file"):
        documents(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"plain text: .*keys \['a', 'b'\]"):
        list(read_chunks(find_inputs([str(tmp_path / "a.txt")]).files, ("a", "b")))
