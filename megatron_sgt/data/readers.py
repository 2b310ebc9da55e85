"""Text files of several kinds as one stream of bounded chunks; documents keep their order.

jsonl: one JSON object per line; text: one document per file; parquet: one document per row. jsonl and text
may be compressed with gzip or zstd. Lines of jsonl are left unparsed for the worker processes.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from megatron_sgt.errors import DataError

Kind = Literal["jsonl", "text", "parquet"]
KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".parquet": "parquet",
}
COMPRESSIONS = (".gz", ".zst")
CHUNK_BYTES = 1 << 20
CHUNK_DOCUMENTS = 4096

Document = tuple[str, ...]
"""One text per requested key."""


@dataclass(frozen=True)
class InputFile:
    """A file and how to read it."""

    path: Path
    kind: Kind
    compression: str
    """"", ".gz" or ".zst"."""


@dataclass
class Chunk:
    """Some consecutive documents of one file, and where they are, for error messages."""

    path: str
    first_line: int
    """Line of ``lines[0]`` (from 1)."""
    lines: list[bytes] = field(default_factory=list)
    """jsonl, not yet parsed."""
    documents: list[Document] = field(default_factory=list)
    """The other kinds."""
    bytes_read: int = 0
    """Bytes on disk that the stream has read so far, over all files."""


def find_files(inputs: Sequence[str], kind: Kind | None = None) -> list[InputFile]:
    """The files named by ``inputs``, folders searched recursively in the order of their sorted paths.

    ``kind`` overrides the suffix. A file named directly with an unknown suffix is plain text; in a folder such files,
    and hidden ones, are skipped.

    Raises:
        DataError: an input does not exist or has nothing to read.
    """
    files: list[InputFile] = []
    for name in inputs:
        path = Path(name)
        if path.is_file():
            files.append(_describe(path, kind) or InputFile(path, "text", _compression(path)))
        elif path.is_dir():
            inside = [_describe(file, kind) for file in sorted(path.rglob("*")) if _is_visible_file(file, path)]
            found = [file for file in inside if file is not None]
            if not found:
                raise DataError(
                    f"no input files in {path}: {len(inside)} files, none ending in {', '.join(KINDS)} "
                    f"(or these with {' or '.join(COMPRESSIONS)}); name the format with --input-format"
                )
            files.extend(found)
        else:
            raise DataError(f"input {path} does not exist")
    return files


def read_chunks(
    files: Sequence[InputFile], keys: Sequence[str] = ("text",), chunk_bytes: int = CHUNK_BYTES
) -> Iterator[Chunk]:
    """Stream all documents in order, about ``chunk_bytes`` of text at a time, at least one document.

    Raises:
        DataError: naming the file that cannot be read or decompressed.
    """
    done = 0
    for file in files:
        reader = {"jsonl": _read_jsonl, "text": _read_text, "parquet": _read_parquet}[file.kind]
        try:
            for chunk in reader(file, keys, chunk_bytes):
                chunk.bytes_read += done
                yield chunk
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"cannot read {file.path}: {reason}") from error
        done += file.path.stat().st_size


def parse(chunk: Chunk, keys: Sequence[str]) -> Iterator[Document]:
    """The documents of a chunk; blank lines are skipped.

    Raises:
        DataError: with file and line; the line is no JSON object or lacks a key.
    """
    yield from chunk.documents
    for number, line in enumerate(chunk.lines, start=chunk.first_line):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(
                f"{chunk.path}:{number}: not a JSON line: {error}; every line must be one object"
            ) from error
        if not isinstance(record, dict):
            raise DataError(f"{chunk.path}:{number}: expected a JSON object, got {type(record).__name__}")
        for key in keys:
            if not isinstance(record.get(key), str):
                got = f"a {type(record[key]).__name__}" if key in record else f"keys {sorted(record)}"
                raise DataError(
                    f"{chunk.path}:{number}: expected a text under key {key!r}, got {got}; choose with --json-keys"
                )
        yield tuple(record[key] for key in keys)


def _read_jsonl(file: InputFile, keys: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    with _open(file) as (stream, raw):
        chunk, size, number = Chunk(str(file.path), 1), 0, 0
        for number, line in enumerate(stream, start=1):
            chunk.lines.append(line)
            size += len(line)
            if size >= chunk_bytes or len(chunk.lines) >= CHUNK_DOCUMENTS:
                chunk.bytes_read = raw.tell()
                yield chunk
                chunk, size = Chunk(str(file.path), number + 1), 0
        if chunk.lines:
            chunk.bytes_read = raw.tell()
            yield chunk


def _read_text(file: InputFile, keys: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    if len(keys) != 1:
        raise DataError(f"{file.path} is plain text: it has one text per document, not the keys {list(keys)}")
    with _open(file) as (stream, raw):
        content = stream.read()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"{file.path} is not UTF-8 text: {error}; convert it or leave it out") from error
        yield Chunk(str(file.path), 1, documents=[(text,)], bytes_read=raw.tell())


def _read_parquet(file: InputFile, keys: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading {file.path} needs pyarrow: pip install 'megatron-sgt[data]'") from error
    total_bytes = file.path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(file.path) as table:
            missing = [key for key in keys if key not in table.schema_arrow.names]
            if missing:
                columns = table.schema_arrow.names
                raise DataError(f"{file.path} has no column {missing[0]!r}, only {columns}; choose with --json-keys")
            num_rows = max(1, table.metadata.num_rows)
            row = 0
            for batch in table.iter_batches(batch_size=256, columns=list(keys)):
                columns = [batch.column(key).to_pylist() for key in keys]
                documents = list(zip(*columns, strict=True))
                _check_rows(file.path, row, documents, keys)
                row += len(documents)
                yield Chunk(str(file.path), 1, documents=documents, bytes_read=total_bytes * row // num_rows)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file.path} is not a parquet file, or damaged: {error}") from error


def _check_rows(path: Path, first: int, documents: list[Document], keys: Sequence[str]) -> None:
    for row, document in enumerate(documents, start=first + 1):
        for key, text in zip(keys, document, strict=True):
            if not isinstance(text, str):
                raise DataError(f"{path}: row {row}: expected a text in column {key!r}, got {type(text).__name__}")


@contextmanager
def _open(file: InputFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The decompressed stream, and the file below it, whose position shows the progress."""
    with file.path.open("rb") as raw:
        if file.compression == ".gz":
            with gzip.open(raw) as stream:
                yield stream, raw  # type: ignore[misc]
        elif file.compression == ".zst":
            with io.BufferedReader(_ZstdReader(raw, file.path), 1 << 20) as stream:
                yield stream, raw
        else:
            yield raw, raw


class _ZstdReader(io.RawIOBase):
    """All frames of a zstd file; unlike the library's own reader it detects a truncated last frame."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"reading {path} needs zstandard: pip install 'megatron-sgt[data]'") from error
        self._raw = raw
        self._library = zstandard
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._frame_is_empty = True
        self._pending = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._pending:
            block = self._frame.unused_data if self._frame.eof else self._raw.read(1 << 17)
            if self._frame.eof:
                block = block or self._raw.read(1 << 17)
                self._frame = self._library.ZstdDecompressor().decompressobj()
                self._frame_is_empty = True
            if not block:
                if not self._frame_is_empty:
                    raise EOFError("the zstd stream is truncated")
                return 0
            self._frame_is_empty = False
            try:
                self._pending = memoryview(self._frame.decompress(block))
            except self._library.ZstdError as error:
                raise OSError(f"damaged zstd stream: {error}") from error
        count = min(len(buffer), len(self._pending))
        buffer[:count] = self._pending[:count]
        self._pending = self._pending[count:]
        return count


def _describe(path: Path, kind: Kind | None) -> InputFile | None:
    compression = _compression(path)
    suffix = Path(path.name.removesuffix(compression)).suffix.lower()
    known = kind or KINDS.get(suffix)
    return InputFile(path, known, compression) if known else None


def _compression(path: Path) -> str:
    return path.suffix if path.suffix in COMPRESSIONS else ""


def _is_visible_file(path: Path, root: Path) -> bool:
    return path.is_file() and not any(part.startswith(".") for part in path.relative_to(root).parts)
