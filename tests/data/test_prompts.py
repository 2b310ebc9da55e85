import gzip
from pathlib import Path

import pytest

from megatron_sgt.data.prompts import read_prompts
from megatron_sgt.errors import DataError


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\r\nb", ["a", "b"]),
        ("a\u2028b\x0cc\n".encode(), ["a\u2028b\x0cc"]),
        (gzip.compress(b"a\n\n b\n"), ["a", "", " b"]),
        (b"", []),
    ],
)
def test_lines(tmp_path: Path, content: bytes, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    assert read_prompts(tmp_path / "p.txt") == expected
    assert capsys.readouterr().err == ""


def test_objects_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n')
    assert read_prompts(tmp_path / "p.jsonl") == ['{"text": "a"}']
    assert capsys.readouterr().err.startswith(f"note: {tmp_path}/p.jsonl looks like JSON")


def test_what_is_refused(tmp_path: Path) -> None:
    for content, message in (
        (b"a\ncaf\xe9\n", "p:2: not UTF-8"),
        (gzip.compress(b"a")[:-4], "cannot read .*p: it is cut off"),
        (b"PK\x03\x04", "p is a zip archive"),
    ):
        (tmp_path / "p").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_prompts(tmp_path / "p")
    with pytest.raises(DataError, match=r"cannot read .*gone: No such file"):
        read_prompts(tmp_path / "gone")
