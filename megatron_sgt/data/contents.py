"""What a file is by its first bytes, whatever its name says; and compressed files as streams."""

import bz2
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from megatron_sgt.errors import DataError

Compression = Literal["", "gzip", "bzip2", "xz", "zstd"]
COMPRESSIONS: dict[str, Compression] = {
    ".gz": "gzip",
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lzma": "xz",
    ".zst": "zstd",
    ".zstd": "zstd",
}
"""Suffixes (small letters) of compressed files that are read."""

_PACKED_MAGIC: tuple[tuple[bytes, Compression], ...] = (
    (b"\x1f\x8b", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x5d\0\0", "xz"),  # the older .lzma
    (b"\x28\xb5\x2f\xfd", "zstd"),
    *((bytes([0x50 + i]) + b"\x2a\x4d\x18", "zstd") for i in range(16)),  # skippable frames
)
_BZIP2_BLOCKS = (b"1AY&SY", b"\x17rE8P\x90")
PARQUET_MAGIC = b"PAR1"
FOREIGN_MAGIC = (
    (b"PK\x03\x04", "a zip archive", "unpack it (unzip)"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "unpack it (lz4 -d), or compress it with zstd"),
    (b"\x02\x21\x4c\x18", "compressed with lz4", "unpack it (lz4 -d), or compress it with zstd"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-zip archive", "unpack it (7z x)"),
    (b"Rar!\x1a\x07", "a rar archive", "unpack it (unrar x)"),
    (b"ARROW1", "an Arrow file", "convert it: datasets.Dataset.from_file(...).to_parquet(...)"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "convert it: datasets.Dataset.from_file(...).to_parquet(...)"),
    (b"%PDF-", "a PDF", "convert it to text"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself", "fetch it: git lfs pull"),
)
"""Beginnings of files that are never text: (bytes, what it is, the fix)."""
_HEAD_BYTES = 256
_BLOCK_BYTES = 1 << 17


class Head(NamedTuple):
    """A file's first bytes and its size."""

    bytes: bytes
    size: int


def head_of(path: Path) -> Head:
    """The beginning of a file.

    Raises:
        DataError: it cannot be read, or holds what no command reads.
    """
    try:
        with path.open("rb") as stream:
            head = Head(stream.read(_HEAD_BYTES), os.fstat(stream.fileno()).st_size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    for magic, what, fix in FOREIGN_MAGIC:
        if head.bytes.startswith(magic):
            raise DataError(f"{path} is {what}, which is not read; {fix}")
    return head


def compression_of(head: bytes) -> Compression:
    """How a file that begins with ``head`` is compressed; "" if it is not."""
    if head[:3] == b"BZh" and head[4:10] in _BZIP2_BLOCKS:
        return "bzip2"
    return next((name for magic, name in _PACKED_MAGIC if head.startswith(magic)), "")


def is_text(head: bytes) -> bool:
    """Whether ``head`` may begin a text: UTF-8 without NUL, a character at its end perhaps cut."""
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end == len(head) and error.reason == "unexpected end of data" and b"\0" not in head
    return b"\0" not in head


def utf16_or_32(head: bytes) -> bool:
    """Whether a text that begins with ``head`` has two or four bytes per character, with or without a mark."""
    zeros = (not any(head[0:8:2]), not any(head[1:8:2])) if len(head) >= 4 else (False, False)
    return head.startswith((b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")) or zeros[0] != zeros[1]


def require_library(compression: Compression, path: Path) -> None:
    """Check that ``path`` can be decompressed here.

    Raises:
        DataError: a library is missing.
    """
    if compression:
        try:
            _DECOMPRESSORS[compression]()
        except ImportError as error:
            raise DataError(f"reading {path} needs zstandard: pip install 'megatron-sgt[data]'") from error


def require_parquet(path: Path) -> None:
    """Check that ``path``, a parquet file, can be read here.

    Raises:
        DataError: the library is missing.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise DataError(f"reading {path} needs pyarrow: pip install 'megatron-sgt[data]'") from error


@contextmanager
def opened(path: Path, compression: Compression) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed stream, and the file below it, whose position shows the progress.

    Raises:
        OSError, EOFError: while it is read: the file is damaged or cut off.
    """
    with path.open("rb") as raw:
        if compression:
            with io.BufferedReader(_Unpacker(raw, _DECOMPRESSORS[compression]), 1 << 20) as stream:
                yield stream, raw
        else:
            yield raw, raw


def _zstd() -> Any:
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


_DECOMPRESSORS: dict[Compression, Callable[[], Any]] = {
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zstd": _zstd,
}


class _Unpacker(io.RawIOBase):
    """All frames of a compressed file.

    Unlike the libraries' own readers it finds a last frame that is cut off, and nothing behind a frame is left out.
    """

    def __init__(self, raw: IO[bytes], decompressor: Callable[[], Any]) -> None:
        self._raw = raw
        self._decompressor = decompressor
        self._frame = decompressor()
        self._frame_is_empty = True
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            if not (block := self._next_block()):
                return 0
            self._frame_is_empty = False
            try:
                self._pending = memoryview(self._frame.decompress(block))
            except (OSError, MemoryError):
                raise
            except Exception as error:  # each library has one of its own
                raise OSError(f"damaged: {error}") from error
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count

    def _next_block(self) -> bytes:
        """What the current frame, or a new one, is to decompress next; b"" at the end of the file."""
        if not self._frame.eof:
            block = self._raw.read(_BLOCK_BYTES)
            if not block and not self._frame_is_empty:
                raise EOFError("it is cut off: the compressed stream has no end")
            return block
        block = self._frame.unused_data.lstrip(b"\0")  # zeros may pad a file, as on tapes
        while not block:
            if not (read := self._raw.read(_BLOCK_BYTES)):
                return b""
            block = read.lstrip(b"\0")
        self._frame = self._decompressor()
        self._frame_is_empty = True
        return block
