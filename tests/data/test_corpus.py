import json
from pathlib import Path

import pytest

from megatron_sgt.data.corpus import MIN_BYTES, build_corpus
from megatron_sgt.errors import DataError


def test_standard_library(tmp_path: Path) -> None:
    report = build_corpus(str(tmp_path / "a.jsonl"))
    assert report.text_bytes >= MIN_BYTES
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(texts) == report.documents > 100
    assert sum(len(text.encode()) for text in texts) == report.text_bytes
    build_corpus(str(tmp_path / "b.jsonl"))
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    root = tmp_path / "lib"
    for name, content in {
        "b.py": b"b = 1\n",
        "a/z.py": b"z = 2\n",
        "empty.py": b"",
        "latin.py": b"# coding: latin-1\ns = '\xe9'\n",
        "undecodable.py": b"s = '\xe9'\n",
        "notes.txt": b"no\n",
        "site-packages/other.py": b"no\n",
        "test/test_b.py": b"test\n",
        "a/tests/test_z.py": b"test\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def read(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_what_is_taken(library: Path, tmp_path: Path) -> None:
    own = ["z = 2\n", "b = 1\n", "# coding: latin-1\ns = 'é'\n"]
    report = build_corpus(str(tmp_path / "a.jsonl"), min_bytes=10, root=str(library))
    assert read(tmp_path / "a.jsonl") == own and not report.with_tests
    assert report.left_out == 1
    report = build_corpus(str(tmp_path / "b.jsonl"), min_bytes=45, root=str(library))
    assert sorted(read(tmp_path / "b.jsonl")) == sorted([*own, "test\n", "test\n"]) and report.with_tests
    with pytest.raises(DataError, match=r"hold 49 bytes of text, fewer than 1,000"):
        build_corpus(str(tmp_path / "c.jsonl"), min_bytes=1000, root=str(library))
    assert not (tmp_path / "c.jsonl").exists()


def test_existing_file_is_kept_unless_asked(library: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("mine")
    with pytest.raises(DataError, match="--overwrite"):
        build_corpus(str(tmp_path / "a.jsonl"), min_bytes=10, root=str(library))
    assert (tmp_path / "a.jsonl").read_text() == "mine"
    build_corpus(str(tmp_path / "a.jsonl"), min_bytes=10, overwrite=True, root=str(library))
    assert len(read(tmp_path / "a.jsonl")) == 3
