"""What names say. What folders hold, and what is said of it: tests/edges/test_inputs.py."""

from pathlib import Path

import pytest

from megatron_sgt.data.inputs import by_name, find_inputs


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", ("jsonl", "")),
        ("a.b.JSON.Gz", ("jsonl", "gzip")),
        ("a.txt.zstd", ("text", "zstd")),
        ("a.md.lzma", ("text", "xz")),
        ("a.snappy.parquet", ("parquet", "")),
        ("a.gz", (None, "gzip")),
        ("a.jsonl.zip", (None, "")),
        (".gz", (None, "")),
        ("a", (None, "")),
    ],
)
def test_by_name(name: str, expected: tuple[str | None, str]) -> None:
    assert by_name(name) == expected


def test_sizes_and_kinds(tmp_path: Path) -> None:
    for name in ("b.out", "a/c.jsonl", "a.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_inputs([str(tmp_path)])
    assert [(str(file.path.relative_to(tmp_path)), file.kind, file.size) for file in found.files] == [
        ("a/c.jsonl", "jsonl", 9),
        ("a.txt", "text", 5),
    ]
    assert [file.kind for file in find_inputs([str(tmp_path)], "text").files] == ["text"] * 3
