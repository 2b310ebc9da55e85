"""Text files of several kinds as one stream of bounded chunks; documents keep their order.

jsonl: one JSON object per line; text: one document per file; parquet: one document per row. jsonl and text
may be compressed. Lines of jsonl are left unparsed for the worker processes.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import IO, Any

from megatron_sgt.data.contents import opened, utf16_or_32
from megatron_sgt.data.documents import BadDocument, Chunk, Document, Position
from megatron_sgt.data.inputs import InputFile
from megatron_sgt.errors import DataError, first_line

CHUNK_BYTES = 1 << 20
CHUNK_DOCUMENTS = 4096
_ROWS = 256


def read_chunks(
    files: Sequence[InputFile],
    keys: Sequence[str] = ("text",),
    chunk_bytes: int = CHUNK_BYTES,
    say: Callable[[str], None] | None = None,
    start: Position | None = None,
) -> Iterator[Chunk]:
    """Stream all documents in order, about ``chunk_bytes`` of text at a time, at least one document.

    ``say`` is told of a file that changes while it is read. ``start``: the ``end`` of the last chunk to leave out.

    Raises:
        DataError: naming the file that cannot be read or decompressed.
    """
    done = 0
    texts = [file.path for file in files if file.kind == "text"]
    if texts and len(keys) != 1:
        raise DataError(f"{texts[0]} is plain text: it has one text per document, not the keys {list(keys)}")
    for index, file in enumerate(files):
        if start is not None and index <= start.file:
            if index < start.file:
                continue
            file = replace(file, start=start.start, first_line=start.line)
        reader = {"jsonl": _read_jsonl, "text": _read_text, "parquet": _read_parquet}[file.kind]
        try:
            for chunk in reader(file, keys, chunk_bytes):
                chunk.bytes_read += done
                assert chunk.end is not None, "every reader says where it is"
                chunk.end = chunk.end._replace(file=index)
                yield chunk
            size = os.stat(file.path).st_size
        except FileNotFoundError as error:
            raise DataError(f"{file.path} was deleted while this command ran; put it back and start again") from error
        except (OSError, EOFError) as error:
            raise DataError(
                f"cannot read {file.path}: {getattr(error, 'strerror', None) or first_line(error)}"
            ) from error
        if size != file.size and say is not None:
            say(
                f"{file.path} changed while this command ran, from {file.size:,} to {size:,} bytes: what was written "
                "to it later may be missing"
            )
        done += file.read_bytes


def _read_jsonl(file: InputFile, keys: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    with opened(file.path, file.compression) as (stream, raw):
        place = _skip(stream, file)
        first = raw.tell()
        chunk, start = _lines_from(file, file.first_line), place
        for line in stream:
            if file.stop is not None and place >= file.stop:
                break
            chunk.lines.append(line)
            place += len(line)
            if place - start >= chunk_bytes or len(chunk.lines) >= CHUNK_DOCUMENTS:
                yield _closed(file, chunk, start, place, raw.tell() - first, is_all=False)
                chunk, start = _lines_from(file, chunk.first_line + len(chunk.lines)), place
        if chunk.lines:
            yield _closed(file, chunk, start, place, raw.tell() - first, is_all=True)


def _skip(stream: IO[bytes], file: InputFile) -> int:
    """Go to where ``file`` is to be read; returns the place."""
    if not file.compression:
        return stream.seek(file.start)
    left = file.start
    while left and (block := stream.read(min(left, CHUNK_BYTES))):
        left -= len(block)
    return file.start - left


def _lines_from(file: InputFile, number: int) -> Chunk:
    return Chunk(str(file.path), number, counted_from=file.counted_from)


def _closed(file: InputFile, chunk: Chunk, start: int, end: int, bytes_read: int, is_all: bool) -> Chunk:
    """``chunk`` with its lines complete, the first ones of a file checked."""
    if start == 0:
        _check_lines(file, chunk.lines, is_all)
    chunk.bytes_read = min(bytes_read, file.read_bytes)
    chunk.end = Position(0, end, chunk.first_line + len(chunk.lines))
    return chunk


def _check_lines(file: InputFile, lines: Sequence[bytes], is_all: bool) -> None:
    """Refuse a file that is no sequence of lines at all: its lines would be so many bad documents."""
    if utf16_or_32(lines[0][:8]):
        raise DataError(f"{file.path} is not UTF-8 but UTF-16 or UTF-32; convert it: iconv -f UTF-16 -t UTF-8")
    filled = [bare for line in lines if (bare := line.removeprefix(b"\xef\xbb\xbf").strip())]
    if not filled:
        return
    first, alone = filled[0], is_all and len(filled) == 1
    if first.startswith(b"[") and (alone or not first.endswith(b"]")):
        raise DataError(
            f"{file.path} is one JSON array, not an object per line; convert it: jq -c '.[]' {file.path} > FILE.jsonl"
        )
    if first.startswith(b"{") and not first.endswith(b"}") and len(filled) > 1 and not filled[1].startswith(b"{"):
        raise DataError(
            f"{file.path} is JSON over several lines, not an object per line; convert it: jq -c . {file.path} > "
            "FILE.jsonl"
        )


def _read_text(file: InputFile, keys: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    if file.start:
        return
    with opened(file.path, file.compression) as (stream, raw):
        documents = [_text(file, stream)]
        yield Chunk(str(file.path), 1, documents=documents, bytes_read=raw.tell(), end=Position(0, 1, 1))


def _text(file: InputFile, stream: IO[bytes]) -> Document | BadDocument:
    content = stream.read()
    if utf16_or_32(content[:8]):
        return BadDocument(str(file.path), "not UTF-8 but UTF-16 or UTF-32; convert it: iconv -f UTF-16 -t UTF-8")
    try:
        return (content.decode("utf-8-sig"),)
    except UnicodeDecodeError as error:
        return BadDocument(str(file.path), f"not UTF-8 text: {error}; convert it or leave it out")


def _read_parquet(file: InputFile, keys: Sequence[str], chunk_bytes: int) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(file.path)
        _check_columns(file, schema, keys)
        # Read as anything else, a dictionary with an invalid text is refused as a whole, without the row.
        dictionaries = [key for key in keys if pyarrow.types.is_dictionary(schema.field(key).type)]
        with pyarrow.parquet.ParquetFile(file.path, read_dictionary=dictionaries) as table:
            last = table.metadata.num_rows if file.stop is None else file.stop
            num_rows = max(1, last - file.start)
            groups, row = _groups(table.metadata, file.start, last)
            for batch in table.iter_batches(batch_size=_ROWS, row_groups=groups, columns=list(keys)):
                if row >= last:  # the rest of a row group, of which a shard has the beginning
                    break
                before, row = row, row + len(batch)
                batch = batch[max(0, file.start - before) : last - before]
                if not len(batch):
                    continue
                first = max(before, file.start)
                columns = [_texts(batch.column(key)) for key in keys]
                documents = [
                    _row(f"{file.path}: row {number}", keys, texts)
                    for number, texts in enumerate(zip(*columns, strict=True), start=first + 1)
                ]
                done = min(row, last) - file.start
                yield Chunk(
                    str(file.path),
                    1,
                    documents=documents,
                    bytes_read=file.size * done // num_rows,
                    end=Position(0, min(row, last), 1),
                )
    except pyarrow.ArrowException as error:
        raise DataError(f"{file.path} is not a parquet file, or damaged: {first_line(error)}") from error


def _groups(metadata: Any, start: int, stop: int) -> tuple[list[int], int]:
    """The row groups that hold rows ``start`` to ``stop``, and the first row of the first of them."""
    ends = list(itertools.accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))
    starts = [0, *ends]
    groups = [i for i, end in enumerate(ends) if end > start and starts[i] < stop]
    return groups, starts[groups[0]] if groups else 0


def _check_columns(file: InputFile, schema: Any, keys: Sequence[str]) -> None:
    from pyarrow import types

    readable = (
        types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary,
        types.is_binary_view, types.is_null,
    )  # fmt: skip
    for key in keys:
        count = schema.names.count(key)
        if count != 1:
            names = "no column" if not count else f"{count} columns"
            raise DataError(f"{file.path} has {names} {key!r}, only {schema.names}; choose with --json-keys")
        kind = schema.field(key).type
        held = kind.value_type if types.is_dictionary(kind) else kind
        if not any(is_kind(held) for is_kind in readable):
            raise DataError(f"{file.path}: column {key!r} holds {kind}, not text; choose with --json-keys")


def _texts(column: Any) -> list[Any]:
    """The values of a column; in the place of a text that is no UTF-8, the error."""
    try:
        return column.to_pylist()
    except ValueError:  # UnicodeDecodeError, or the library's own
        return [_value(column, i) for i in range(len(column))]


def _value(column: Any, i: int) -> Any:
    try:
        return column[i].as_py()
    except ValueError as error:
        return error


def _row(where: str, keys: Sequence[str], values: Sequence[Any]) -> Document | BadDocument:
    texts = []
    for key, value in zip(keys, values, strict=True):
        if isinstance(value, bytes):  # a writer that does not mark its texts as such
            try:
                value = value.decode()
            except UnicodeDecodeError as error:
                value = error
        if isinstance(value, ValueError):
            return BadDocument(where, f"column {key!r} is not UTF-8: {first_line(value)}")
        if not isinstance(value, str):
            return BadDocument(where, f"expected a text in column {key!r}, got a {type(value).__name__}")
        texts.append(value)
    return tuple(texts)
