"""The share of one job of several in the input: consecutive bytes, cut between documents.

The input is the bytes of all files, one behind the other. Shard i of n gets every document that begins in
[total · i / n, total · (i + 1) / n): lines of jsonl by their first byte, rows of parquet as if all were equally long,
and compressed files and texts as a whole. So the shards in order are the input, whatever its files are like.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_sgt.data.inputs import InputFile

_BLOCK = 1 << 16


@dataclass(frozen=True)
class Shard:
    """One of ``count`` equal parts."""

    index: int
    """From 0."""
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def prefix(self, prefix: str) -> str:
        """Of this shard's files, by that of all."""
        return f"{prefix}-{self.index:05d}-of-{self.count:05d}"


def files_of(shard: Shard, files: Sequence[InputFile]) -> tuple[InputFile, ...]:
    """What of ``files`` belongs to ``shard``.

    Raises:
        OSError: a file cannot be read.
    """
    return tuple(_files_of(shard, files))


def _files_of(shard: Shard, files: Sequence[InputFile]) -> Iterator[InputFile]:
    total = sum(file.size for file in files)
    first, last = (total * i // shard.count for i in (shard.index, shard.index + 1))
    if shard.index + 1 == shard.count:
        last += 1  # a file without any byte may stand at the very end
    begin = 0
    for file in files:
        low, high = max(0, first - begin), min(file.size, last - begin)
        if file.size == 0 or not _is_divisible(file):
            if first <= begin < last:
                yield file
        elif (low, high) == (0, file.size):
            yield file
        elif low < high:
            yield _part(file, low, high)
        begin += file.size


def _is_divisible(file: InputFile) -> bool:
    return file.kind == "parquet" or (file.kind == "jsonl" and not file.compression)


def _part(file: InputFile, first: int, last: int) -> InputFile:
    """The documents of ``file`` that begin in its bytes ``first`` to ``last``."""
    if file.kind == "parquet":
        import pyarrow.parquet

        rows = pyarrow.parquet.read_metadata(file.path).num_rows
        start, stop = (-(-byte * rows // file.size) for byte in (first, last))
        return replace(file, start=start, stop=stop)
    start, stop = (_line_at(file.path, byte) for byte in (first, last))
    return replace(file, start=start, stop=stop, counted_from=start)


def _line_at(path: Path, offset: int) -> int:
    """Where the first line that begins at ``offset`` or behind it begins; the end of the file if there is none."""
    if offset == 0:
        return 0
    with path.open("rb") as stream:
        place = stream.seek(offset - 1)
        while block := stream.read(_BLOCK):
            end = block.find(b"\n")
            if end >= 0:
                return place + end + 1
            place += len(block)
        return place
