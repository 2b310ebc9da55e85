"""Documents of a chunk, good and bad; and how many bad ones a command takes."""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from megatron_sgt.errors import DataError

Document = tuple[str, ...]
"""One text per requested key."""
MAX_DEPTH = 500
"""Python's parser takes about twice that, depending on who calls it; this limit is the same in every worker."""
_KEYS_SHOWN = 12
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')
_BRACKET = re.compile(rb"[\[\]{}]")


@dataclass(frozen=True)
class BadDocument:
    """A line, row or file that holds no document, and why."""

    where: str
    """"a.jsonl:4", "a.parquet: row 4", "a.txt"."""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Position(NamedTuple):
    """A place between two documents of the input."""

    file: int
    """Of the files that are read, from 0."""
    start: int
    """As ``InputFile.start``."""
    line: int
    """As ``InputFile.first_line``."""


@dataclass
class Chunk:
    """Some consecutive documents of one file, and where they are, for error messages."""

    path: str
    first_line: int
    """Line of ``lines[0]`` (from 1)."""
    lines: list[bytes] = field(default_factory=list)
    """jsonl, not yet parsed."""
    documents: list[Document | BadDocument] = field(default_factory=list)
    """The other kinds."""
    bytes_read: int = 0
    """Bytes on disk that the stream has read so far, over all files."""
    counted_from: int = 0
    """Where in the file line 1 is."""
    end: Position | None = None
    """What comes next."""


class BadDocuments:
    """Counts those that are left out, up to ``most``."""

    def __init__(self, most: int = 0, count: int = 0, first: BadDocument | None = None) -> None:
        self.most = most
        self.count = count
        self.first = first

    def add(self, count: int, first: BadDocument | None) -> None:
        """Count ``count`` more, of which ``first`` comes first.

        Raises:
            DataError: there are more than ``most``.
        """
        self.count += count
        self.first = self.first or first
        if self.count <= self.most:
            return
        if self.most == 0:
            raise DataError(f"{self.first}; correct it, or leave out up to N such documents with --max-bad-documents N")
        raise DataError(
            f"more than {self.most:,} bad documents (--max-bad-documents), the first is {self.first}; correct them, or "
            "allow more"
        )

    def share(self, others: int) -> float:
        """Of all documents, if there are ``others`` beside these."""
        return self.count / max(1, self.count + others)

    def line(self, others: int) -> str | None:
        """What to say of them, if there are any."""
        if not self.count:
            return None
        return (
            f"{self.count:,} bad documents left out, {100 * self.share(others):.2g} % of {self.count + others:,}; "
            f"the first is {self.first}"
        )


def parse(chunk: Chunk, keys: Sequence[str]) -> Iterator[Document | BadDocument]:
    """The documents of a chunk, the bad ones in their places; blank lines are no documents."""
    yield from chunk.documents
    for number, line in enumerate(chunk.lines, start=chunk.first_line):
        if bare := line.removeprefix(b"\xef\xbb\xbf").strip():
            document = _parse_line(bare, keys)
            if isinstance(document, str):
                line_of_file = number + (lines_before(chunk.path, chunk.counted_from) if chunk.counted_from else 0)
                yield BadDocument(f"{chunk.path}:{line_of_file}", document)
            else:
                yield document


@functools.lru_cache(maxsize=16)
def lines_before(path: str, offset: int) -> int:
    """Ends of lines in the first ``offset`` bytes of a file; only to name the line of a bad document."""
    count, left = 0, offset
    with open(path, "rb") as stream:
        while block := stream.read(min(left, 1 << 22)):
            count += block.count(b"\n")
            left -= len(block)
    return count


def _parse_line(line: bytes, keys: Sequence[str]) -> Document | str:
    """The texts, or what is wrong with the line."""
    if _depth(line) > MAX_DEPTH:
        return f"JSON nested more than {MAX_DEPTH} deep"
    try:
        record = _loads(line)
    except UnicodeDecodeError as error:
        return f"not a JSON line: not UTF-8: {error}"
    except ValueError as error:
        return f"not a JSON line: {error}; every line must be one object"
    if not isinstance(record, dict):
        return f"expected a JSON object, got {type(record).__name__}"
    for key in keys:
        if not isinstance(record.get(key), str):
            got = f"a {type(record[key]).__name__}" if key in record else f"keys {_shown(record)}"
            return f"expected a text under key {key!r}, got {got}; choose with --json-keys"
        if line.count(json.dumps(key).encode()) > 1 and _stands_twice(line, key):
            return f"key {key!r} stands twice in the object"
    return tuple(record[key] for key in keys)


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise
    except ValueError:  # an integer longer than Python converts; it is good JSON
        return json.loads(line, parse_int=float)


def _depth(line: bytes) -> int:
    """How deep brackets outside of strings are nested; 0 if there are too few of them to matter."""
    if line.count(b"[") + line.count(b"{") <= MAX_DEPTH:
        return 0
    depth = deepest = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", line)):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _shown(record: dict[str, Any]) -> str:
    rest = len(record) - _KEYS_SHOWN
    return f"{sorted(record)[:_KEYS_SHOWN]}" + (f" and {rest:,} more" if rest > 0 else "")


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all its keys."""


def _stands_twice(line: bytes, key: str) -> bool:
    pairs = json.loads(line, object_pairs_hook=_Pairs, parse_int=float)
    return sum(name == key for name, _ in pairs) > 1
