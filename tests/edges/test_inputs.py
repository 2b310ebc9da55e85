"""No input is left out in silence: what folders and names may hold, what is read of it, what is said of the rest."""

from __future__ import annotations

import bz2
import functools
import gzip
import json
import lzma
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_sgt.data.documents import BadDocument, parse
from megatron_sgt.data.inputs import find_inputs
from megatron_sgt.data.readers import read_chunks
from megatron_sgt.errors import DataError
from tests.helpers.edges import in_every_encoding
from tests.helpers.tokenizers import write_sentencepiece

Make = Callable[[], object]


def write(name: str, content: str | bytes = "") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def record(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def jsonl(name: str, *texts: str) -> Path:
    return write(name, b"".join(map(record, texts)))


def link(target: str, name: str) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, name)


def parquet(name: str, texts: list[object], column: str = "text", times: int = 1) -> None:
    columns = [pyarrow.array(texts)] * times
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, [column] * times), name)


def read(inputs: list[str], kind: str | None = None) -> tuple[list[str], str]:
    """Every document (a bad one as its message), and all notes."""
    found = find_inputs(inputs, kind)  # type: ignore[arg-type]
    documents = [document for chunk in read_chunks(found.files) for document in parse(chunk, ("text",))]
    texts = [str(document) if isinstance(document, BadDocument) else document[0] for document in documents]
    return texts, "\n".join(found.notes)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, in which ``data/a.jsonl`` holds one document."""
    monkeypatch.chdir(tmp_path)
    jsonl("data/a.jsonl", "one")
    return tmp_path


READ: dict[str, tuple[list[Make], list[str], str]] = {
    "a linked folder": ([lambda: jsonl("b/b.jsonl", "two"), lambda: link("../b", "data/b")], ["one", "two"], "^$"),
    "links in a linked folder": (
        [lambda: jsonl("c/c.jsonl", "two"), lambda: link("../c", "b/c"), lambda: link("../b", "data/b")],
        ["one", "two"],
        "^$",
    ),
    "a linked file": (
        [lambda: jsonl("b/b.jsonl", "two"), lambda: link("../b/b.jsonl", "data/b.jsonl")],
        ["one", "two"],
        "^$",
    ),
    "a link without a suffix": (
        [lambda: jsonl("b.jsonl", "two"), lambda: link("../b.jsonl", "data/b")],
        ["one", "two"],
        "^$",
    ),
    "links to blobs": (
        [lambda: jsonl("data/blobs/1f0", "two"), lambda: link("blobs/1f0", "data/b.jsonl")],
        ["one", "two"],
        "^$",
    ),
    "a link to the folder itself": ([lambda: link(".", "data/me")], ["one"], r"left out: 1 upward link \(data/me\)"),
    "a link to the parent": (
        [lambda: jsonl("other.jsonl", "other"), lambda: link("..", "data/up")],
        ["one"],
        r"1 upward link \(data/up\)",
    ),
    "a link to itself": ([lambda: link("loop", "data/loop")], ["one"], r"1 broken link \(data/loop\)"),
    "links in a circle": (
        [lambda: jsonl("b/b.jsonl", "two"), lambda: link("../b", "data/b"), lambda: link("../data", "b/back")],
        ["one", "two"],
        r"read once, though met twice: data/b/back \(as data\)",
    ),
    "two links to one folder": (
        [lambda: jsonl("b/b.jsonl", "two"), lambda: link("../b", "data/b"), lambda: link("../b", "data/c")],
        ["one", "two"],
        r"read once, though met twice: data/c \(as data/b\)",
    ),
    "a broken link": ([lambda: link("gone.jsonl", "data/b.jsonl")], ["one"], r"1 broken link \(data/b.jsonl\)"),
    "a file and a link to it": (
        [lambda: link("a.jsonl", "data/0.jsonl")],
        ["one"],
        r"data/0.jsonl \(as data/a.jsonl\)",
    ),
    "a file under two names": (
        [lambda: os.link("data/a.jsonl", "data/b.jsonl")],
        ["one"],
        r"met twice: data/b.jsonl \(as data/a.jsonl\)",
    ),
    "hidden files and folders": (
        [lambda: jsonl("data/.ipynb_checkpoints/a.jsonl", "x"), lambda: write("data/.DS_Store")],
        ["one"],
        r"left out: 2 hidden \(.DS_Store, .ipynb_checkpoints\)",
    ),
    "unknown suffixes": (
        [
            lambda: [write(f"data/{i}.json.lz4") for i in range(3)],
            lambda: write("data/a.csv"),
            lambda: write("data/LOG"),
        ],
        ["one"],
        r"left out: 3 \.json\.lz4, 1 \.csv, 1 without suffix \(LOG\)",
    ),
    "what is neither file nor folder": ([lambda: os.mkfifo("data/b.jsonl")], ["one"], r"1 FIFO \(data/b.jsonl\)"),
    "suffixes in capitals": (
        [
            lambda: write("data/b.JSONL.GZ", gzip.compress(record("two"))),
            lambda: write("data/c.Txt", "three"),
            lambda: parquet("data/d.PARQUET", ["four"]),
        ],
        ["one", "two", "three", "four"],
        "beside 3 files of records, 1 file of plain text",
    ),
    "all compressions": (
        [
            lambda: write("data/b.jsonl.xz", lzma.compress(record("two"))),
            lambda: write("data/c.jsonl.bz2", bz2.compress(record("three"))),
            lambda: write("data/d.jsonl.lzma", lzma.compress(record("four"), lzma.FORMAT_ALONE)),
        ],
        ["one", "two", "three", "four"],
        "^$",
    ),
    "compressed, its name does not say so": (
        [lambda: write("data/b.jsonl", gzip.compress(record("two")))],
        ["one", "two"],
        "compressed with gzip, which the name does not say: data/b.jsonl",
    ),
    "not compressed, its name says so": (
        [lambda: jsonl("data/b.jsonl.gz", "two"), lambda: jsonl("data/c.jsonl.xz", "three")],
        ["one", "two", "three"],
        "not compressed, though the name says gzip: data/b.jsonl.gz\nnot compressed, though the name says xz",
    ),
    "parquet under another name": (
        [lambda: parquet("data/b.json", ["two"])],
        ["one", "two"],
        "parquet by content, not by name: data/b.json",
    ),
    "compressed beside itself": (
        [lambda: write("data/a.jsonl.gz", gzip.compress(record("one")))],
        ["one", "one"],
        "compressed and not, .* perhaps the same documents again: data/a.jsonl$",
    ),
    "side files of a hub repository": (
        [
            lambda: write("data/README.md", "# x"),
            lambda: write("data/LICENSE"),
            lambda: write("data/.gitattributes"),
            lambda: write("data/dataset_infos.json", "{\n}"),
        ],
        ["one"],
        r"3 side files of a data set \(LICENSE, README.md, dataset_infos.json\), 1 hidden \(.gitattributes\)",
    ),
    "a data set's own description": (
        [lambda: write("data/b.json", "{\n}"), lambda: write("data/b.idx"), lambda: write("data/b.bin")],
        ["one"],
        r"1 \.bin, 1 \.idx, 1 side file of a data set \(b.json\)",
    ),
    "splits": (
        [lambda: jsonl("data/test/a.jsonl", "two"), lambda: jsonl("data/train-00000-of-00001.jsonl", "three")],
        ["one", "two", "three"],
        "splits of a data set are read together: files of 1 test, 1 train",
    ),
    "splits in names": (
        [lambda: jsonl("data/c4-dev.jsonl", "two"), lambda: jsonl("data/c4-train.00000-of-01024.jsonl", "three")],
        ["one", "two", "three"],
        "files of 1 train, 1 validation",
    ),
    "an empty file": (
        [lambda: write("data/b.jsonl"), lambda: write("data/c.jsonl.gz")],
        ["one"],
        "empty files: data/b.jsonl, data/c",
    ),
    "a byte order mark, and lines that end as on Windows": (
        [lambda: write("data/b.jsonl", b"\xef\xbb\xbf" + record("two").replace(b"\n", b"\r\n"))],
        ["one", "two"],
        "^$",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_folder(name: str) -> None:
    makes, texts, said = READ[name]
    for make in makes:
        make()
    found, notes = read(["data"])
    assert found == texts
    assert re.search(said, notes), notes


NAMED: dict[str, tuple[list[Make], list[str], list[str], str]] = {
    "a folder twice": ([], ["data", "data/"], ["one"], r"met twice: data \(as data\)"),
    "a file and its folder": ([], ["data/a.jsonl", "data"], ["one"], r"data/a.jsonl \(as data/a.jsonl\)"),
    "a folder and its file": ([], ["data", "./data/a.jsonl"], ["one"], r"data/a.jsonl \(as data/a.jsonl\)"),
    "a file and a link to it": (
        [lambda: link("data/a.jsonl", "b.jsonl")],
        ["data/a.jsonl", "b.jsonl"],
        ["one"],
        r"b.jsonl \(as",
    ),
    "a folder in another": (
        [lambda: jsonl("data/sub/b.jsonl", "two")],
        ["data/sub", "data"],
        ["two", "one"],
        r"data/sub \(as data/sub\)",
    ),
    "a table": (
        [lambda: write("b.csv", "text\ntwo\n")],
        ["b.csv"],
        ["text\ntwo\n"],
        "as plain text, one document: b.csv",
    ),
    "no suffix": ([lambda: write("b", "two")], ["data", "b"], ["one", "two"], "as plain text, one document: b;"),
    "a side file": ([lambda: write("README.md", "two")], ["README.md"], ["two"], "^$"),
    "a hidden folder": ([lambda: jsonl(".b/b.jsonl", "two")], [".b"], ["two"], "^$"),
    "a folder of texts": ([lambda: write("b/README.md", "two")], ["b"], ["two"], "^$"),
    "two bytes per character": (
        [lambda: write("b.txt", "two".encode("utf-16"))],
        ["b.txt"],
        ["b.txt: not UTF-8 but UTF-16 or UTF-32; convert it: iconv -f UTF-16 -t UTF-8"],
        "^$",
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_inputs(name: str) -> None:
    makes, inputs, texts, said = NAMED[name]
    for make in makes:
        make()
    found, notes = read(inputs)
    assert found == texts
    assert re.search(said, notes), notes


REFUSED: dict[str, tuple[Make, str, str]] = {
    "an empty folder": (lambda: Path("b").mkdir(), "b", "no input files in b: it holds nothing"),
    "nothing readable": (lambda: write("b/a.arrow"), "b", r"no input files in b: it holds 1 \.arrow; read are \.jsonl"),
    "hidden files alone": (lambda: jsonl("b/.cache/a.jsonl", "x"), "b", r"b: it holds 1 hidden \(.cache\)"),
    "broken links alone": (lambda: link("gone", "b/a.jsonl"), "b", r"b: it holds 1 broken link \(b/a.jsonl\)"),
    "a broken link": (lambda: link("gone", "b"), "b", "input b is a broken link to gone"),
    "a pattern": (lambda: None, "b/*.jsonl", r"b/\*.jsonl does not exist: no file matches it"),
    "a FIFO": (lambda: os.mkfifo("b"), "b", "input b is a FIFO: inputs are files or folders"),
    "a device": (lambda: None, "/dev/null", "/dev/null is a device"),
    "a zip archive": (
        lambda: write("b.jsonl.zip", b"PK\x03\x04.."),
        "b.jsonl.zip",
        r"zip archive, .*unpack it \(unzip\)",
    ),
    "lz4": (lambda: write("b.jsonl", b"\x04\x22\x4d\x18"), "b.jsonl", r"compressed with lz4, .*lz4 -d"),
    "a pointer": (lambda: write("b.txt", "version https://git-lfs.github.com/spec/v1\n"), "b.txt", "git lfs pull"),
    "zeros in the place of an archive": (
        lambda: write("b.jsonl.gz", bytes(99)),
        "b.jsonl.gz",
        "neither as gzip does nor",
    ),
    "an array": (lambda: write("b.json", '[{"text": "a"}, {"text": "b"}]'), "b.json", "b.json is one JSON array.*jq"),
    "an array in lines": (lambda: write("b/b.json", '[\n{"text": "a"}\n]'), "b", "b/b.json is one JSON array.*jq"),
    "an object in lines": (lambda: write("b.json", '{\n "text": "a"\n}'), "b.json", "JSON over several lines.*jq"),
    "UTF-16": (lambda: write("b.jsonl", record("a").decode().encode("utf-16")), "b.jsonl", "UTF-16.*iconv"),
    "UTF-16 without a mark": (lambda: write("b.jsonl", record("a").decode().encode("utf-16-be")), "b.jsonl", "UTF-16"),
    "a cut archive": (
        lambda: write("b.json.gz", gzip.compress(record("a"))[:-9]),
        "b.json.gz",
        "cannot read b.json.gz: it is cut",
    ),
    "a damaged archive": (
        lambda: write("b.json.xz", lzma.compress(record("a"))[:40] + bytes(40)),
        "b.json.xz",
        "damaged: Corrupt",
    ),
    "something behind an archive": (
        lambda: write("b.json.bz2", bz2.compress(record("a")) + b"x"),
        "b.json.bz2",
        "cannot read b",
    ),
    "a cut parquet file": (
        lambda: write("b.parquet", b"PAR1" + bytes(99)),
        "b.parquet",
        "b.parquet is not a parquet file",
    ),
    "an empty parquet file": (lambda: write("b.parquet"), "b.parquet", "b.parquet is not a parquet file, or damaged"),
    "no such column": (lambda: parquet("b.parquet", [1], "id"), "b.parquet", r"no column 'text', only \['id'\]"),
    "a column of lists": (lambda: parquet("b.parquet", [["a"]]), "b.parquet", "column 'text' holds list<.*not text"),
    "two such columns": (
        lambda: parquet("b.parquet", ["a"], times=2),
        "b.parquet",
        "2 columns 'text'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    make, given, said = REFUSED[name]
    make()
    with pytest.raises(DataError, match=said) as refusal:
        read([given])
    assert "\n" not in str(refusal.value)


def test_a_folder_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so that the system's refusal is pretended."""

    def scandir(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"^cannot read the folder data: Permission denied$"):
        find_inputs(["data"])


@pytest.mark.parametrize(("change", "said"), [("grown", "from 16 to 32 bytes"), ("cut", "from 16 to 4 bytes")])
def test_a_file_that_changes_meanwhile_is_said(change: str, said: str) -> None:
    files = find_inputs(["data"]).files
    lines: list[str] = []
    for _ in read_chunks(files, say=lines.append):
        write("data/a.jsonl", 2 * record("one") if change == "grown" else b"{}\n\n")
    assert len(lines) == 1 and said in lines[0]


def test_a_file_that_is_deleted_meanwhile_is_named() -> None:
    jsonl("data/b.jsonl", "two")
    files = find_inputs(["data"]).files
    for deleted in ("data/b.jsonl", "data/a.jsonl"):
        os.unlink(deleted)
        with pytest.raises(DataError, match=f"^{deleted} was deleted while this command ran"):
            list(read_chunks(files))


def test_both_commands_read_and_say_the_same_on_every_terminal(folder: Path) -> None:
    write_sentencepiece(folder / "t.model")
    jsonl("more/é.jsonl", "the quick brown fox jumps over the lazy dog " * 40)
    link("../more", "data/more")
    write("data/ű.csv")
    said = ["left out: 1 .csv", "met twice: data/a.jsonl"]
    inputs = ["--input", "data", "--input", "data/a.jsonl", "--overwrite"]
    preprocess = [*inputs, "--output-prefix", "o", "--tokenizer-model", "t.model", "--workers", "1"]
    train = [*inputs, "--output", "u.model", "--vocab-size", "300"]
    for script, arguments, result in (
        ("tools/preprocess_data.py", preprocess, "2 documents"),
        ("tools/train_tokenizer.py", train, "2 documents"),
    ):
        in_every_encoding(script, arguments, folder, 0, check=functools.partial(_says, result, said))


def _says(result: str, said: list[str], finished: object) -> None:
    assert result in finished.out  # type: ignore[attr-defined]
    lines = finished.err.splitlines()  # type: ignore[attr-defined]
    assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines, strict=True)), lines
