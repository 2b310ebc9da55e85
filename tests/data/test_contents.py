import bz2
import gzip
import lzma
from pathlib import Path

import pytest
import zstandard

from megatron_sgt.data.contents import Compression, compression_of, is_text, opened, utf16_or_32

TEXT = b"some text\n" * 50_000
PACKED: dict[str, tuple[Compression, bytes]] = {
    "gzip": ("gzip", gzip.compress(TEXT)),
    "bzip2": ("bzip2", bz2.compress(TEXT)),
    "xz": ("xz", lzma.compress(TEXT)),
    "lzma": ("xz", lzma.compress(TEXT, lzma.FORMAT_ALONE)),
    "zstd": ("zstd", zstandard.ZstdCompressor().compress(TEXT)),
    "a skippable frame first": (
        "zstd",
        b"\x53\x2a\x4d\x18\x04\0\0\0skip" + zstandard.ZstdCompressor().compress(TEXT),
    ),
}


@pytest.mark.parametrize("name", PACKED)
def test_what_is_compressed(tmp_path: Path, name: str) -> None:
    compression, content = PACKED[name]
    assert compression_of(content[:64]) == compression
    path = tmp_path / "a"
    for written, expected in ((content, TEXT), (content * 2, TEXT * 2)):
        path.write_bytes(written)
        with opened(path, compression) as (stream, raw):
            assert stream.read() == expected
            assert raw.tell() == len(written)
    for damaged in (content[:-4], content + content[: len(content) // 2], content + b"behind"):
        path.write_bytes(damaged)
        with pytest.raises((OSError, EOFError)), opened(path, compression) as (stream, _):
            stream.read()


def test_zeros_behind_a_frame_are_padding(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(PACKED["gzip"][1] + bytes(300_000) + PACKED["gzip"][1] + bytes(512))
    with opened(tmp_path / "a", "gzip") as (stream, _):
        assert stream.read() == TEXT * 2


@pytest.mark.parametrize("head", [b"", b"BZh1 is a text", b"PK", b"]", b"some text", b"\x1f"])
def test_what_is_not_compressed(head: bytes) -> None:
    assert compression_of(head) == ""


def test_texts() -> None:
    assert is_text("é漢".encode()) and is_text("é漢".encode()[:-1])
    assert not is_text(b"a\xff") and not is_text(b"a\0") and not is_text(b"\xe9 b")
    for coding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"):
        assert utf16_or_32("text".encode(coding)), coding
    for head in (b"", b"a", b"text", "éé".encode(), bytes(8), b"a\0bc", b"\0text"):
        assert not utf16_or_32(head), head
