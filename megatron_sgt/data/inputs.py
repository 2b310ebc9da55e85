"""Which files the commands read: those that are named, and those of folders; and what must be said of the others.

What is left out, met twice, or read otherwise than its name promises stands in one line each (``Inputs.notes``).
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_sgt.data import contents
from megatron_sgt.data.contents import COMPRESSIONS, PARQUET_MAGIC, Compression
from megatron_sgt.data.folders import Folders, Found, identity_of, kind_of
from megatron_sgt.data.listing import counted, list_left_out, listed
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
"""Suffixes in small letters."""
INPUT_HELP = (
    "files, or folders to search, links followed: .jsonl, .json, .ndjson (an object per line), .txt, .text, .md (one "
    "document per file), all of these with .gz, .bz2, .xz, .lzma, .zst or .zstd, and .parquet; what a folder holds "
    "beside these is left out and listed"
)
BAD_HELP = (
    "leave out up to N bad documents (invalid UTF-8 or JSON, no text under the key), count them and name the first; "
    "one more is an error [%(default)s]"
)
_SIDE_RECORDS = frozenset(
    ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json")
)
_SIDE_TEXTS = re.compile(r"(readme|licen[sc]e|copying|notice|citation|changelog|contributing)\b.*", re.IGNORECASE)
_SPLIT = re.compile(r"(?<![a-z])(train|valid|validation|val|dev|test|eval)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class InputFile:
    """A file, or a part of one, and how to read it."""

    path: Path
    kind: Kind
    compression: Compression
    size: int
    """Bytes on disk when it was found."""
    start: int = 0
    """What is read begins here: bytes of jsonl without its compression, rows of parquet, a text is 1."""
    stop: int | None = None
    """And ends before this one; None: the end of the file."""
    counted_from: int = 0
    """A byte of jsonl from which its lines are counted."""
    first_line: int = 1
    """The line at ``start``, so counted."""

    @property
    def read_bytes(self) -> int:
        """Bytes on disk that are read, about."""
        if self.kind == "jsonl" and not self.compression:
            return max(0, (self.size if self.stop is None else self.stop) - self.start)
        return self.size


@dataclass(frozen=True)
class Inputs:
    """What a command reads, in this order, and a line for each thing that its user should know of it."""

    files: tuple[InputFile, ...]
    notes: tuple[str, ...]


def find_inputs(inputs: Sequence[str], kind: Kind | None = None) -> Inputs:
    """The files named by ``inputs``; folders are searched, linked ones too, in the order of their sorted paths.

    ``kind`` overrides the suffix. A file named directly with an unknown suffix is plain text; in a folder such files
    are left out, and hidden ones, and what describes a data set. No file is read twice. What a file's first bytes say
    overrides how its name says that it is compressed.

    Raises:
        DataError: an input does not exist, cannot be read, or has nothing to read.
    """
    search = _Search(kind)
    for name in inputs:
        search.add(Path(name))
    return Inputs(tuple(search.files), tuple(search.notes()))


def by_name(name: str) -> tuple[Kind | None, Compression]:
    """What the suffixes of ``name`` say, in any letter case; None for an unknown one."""
    inner, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix, "")
    return KINDS.get(os.path.splitext(inner)[1] if compression else suffix), compression


class _Search:
    """All inputs of one command."""

    def __init__(self, kind: Kind | None) -> None:
        self.files: list[InputFile] = []
        self._kind = kind
        self._folders = Folders()
        self._names: dict[str, Path] = {}
        """Identity of a file -> the name under which it is read."""
        self._repeated: list[tuple[Path, Path]] = []
        self._left_out: list[Path] = []
        self._side: list[Path] = []
        self._untold: list[Path] = []
        """Named, without a known suffix."""
        self._otherwise: dict[str, list[Path]] = {}
        """What is otherwise than names say -> the files."""
        self._places: list[tuple[str, ...]] = []
        """Of every file: what of its path may name a split."""

    def add(self, path: Path) -> None:
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"input {path} {_why_not(path, error)}") from error
        if stat.S_ISDIR(status.st_mode):
            self._add_folder(path)
        elif stat.S_ISREG(status.st_mode):
            target = os.path.realpath(path)
            kind, compression = self._describe(path, target)
            if kind is None and contents.head_of(path).bytes[:4] != PARQUET_MAGIC:
                self._untold.append(path)
            identity = identity_of(status, target)
            if self._is_new(path, identity):
                self._read(path, kind or "text", compression, (path.parent.name, path.name))
        else:
            raise DataError(
                f"input {path} is a {kind_of(status.st_mode)}: inputs are files or folders; write it into a file first"
            )

    def _add_folder(self, root: Path) -> None:
        repeats = len(self._folders.repeated), len(self._repeated)
        passed = len(self._folders.passed_over)
        found = self._folders.search(root)
        described = [(file, *self._describe(file.path, file.target)) for file in found]
        has_records = any(kind in ("jsonl", "parquet") and not _is_side_record(file) for file, kind, _ in described)
        side = {file.path for file in found if _is_side_record(file) or (has_records and _is_side_text(file))}
        wanted = [(file, kind, compression) for file, kind, compression in described if kind and file.path not in side]
        fresh = set()
        for file, _, _ in sorted(wanted, key=lambda entry: entry[0].linked):  # a file's own name comes before a link
            if self._is_new(file.path, file.identity):
                fresh.add(file.path)
        before = len(self.files)
        for file, kind, compression in wanted:
            if file.path in fresh:
                self._read(file.path, kind, compression, file.path.relative_to(root).parts)
        left_out = [
            file.path
            for file, kind, _ in described
            if not kind and file.path not in side and file.identity not in self._names
        ]
        if len(self.files) == before and repeats == (len(self._folders.repeated), len(self._repeated)):
            others = [(entry.path, entry.reason) for entry in self._folders.passed_over[passed:]]
            there = list_left_out(left_out, [file.path for file in found if file.path in side], others)
            raise DataError(
                f"no input files in {root}: it holds {there or 'nothing'}; read are {', '.join(KINDS)}, all but the "
                f"last with {', '.join(COMPRESSIONS)} too; name the format with --input-format"
            )
        self._left_out += left_out
        self._side += [file.path for file in found if file.path in side]

    def _describe(self, path: Path, target: str) -> tuple[Kind | None, Compression]:
        """By the name of a file, by that of what it links to, or as the command line says."""
        kind, compression = by_name(path.name)
        if kind is None and not compression:
            kind, compression = by_name(os.path.basename(target))
        return self._kind or kind, compression

    def _is_new(self, path: Path, identity: str) -> bool:
        first = self._names.setdefault(identity, path)
        if first is not path:
            self._repeated.append((path, first))
        return first is path

    def _read(self, path: Path, kind: Kind, compression: Compression, place: tuple[str, ...]) -> None:
        file = InputFile(path, kind, compression, 0)
        file, otherwise = _look_into(file, forced=self._kind is not None)
        self.files.append(file)
        self._places.append(place)
        if otherwise is not None:
            self._otherwise.setdefault(otherwise, []).append(path)

    def notes(self) -> Iterator[str]:
        """One line for each thing to say."""
        others = [(entry.path, entry.reason) for entry in self._folders.passed_over]
        if there := list_left_out(self._left_out, self._side, others):
            yield f"left out: {there}; name a file to have it read"
        if repeated := self._folders.repeated + self._repeated:
            yield "read once, though met twice: " + listed([f"{path} (as {first})" for path, first in repeated])
        yield from (f"{otherwise}: {listed(paths)}" for otherwise, paths in self._otherwise.items())
        if self._untold:
            yield (
                f"no known suffix, so each is read as plain text, one document: {listed(self._untold)}; "
                "name another format with --input-format"
            )
        yield from _about(self.files, self._places)


def _look_into(file: InputFile, forced: bool) -> tuple[InputFile, str | None]:
    """``file`` as its first bytes show it, and what to say if its name says otherwise."""
    head, size = contents.head_of(file.path)
    file = replace(file, size=size)
    actual = contents.compression_of(head)
    is_parquet = head.startswith(PARQUET_MAGIC)
    if is_parquet or file.kind == "parquet":
        contents.require_parquet(file.path)
    if is_parquet and file.kind != "parquet":
        if forced:
            raise DataError(f"{file.path} is a parquet file, not {file.kind}; leave out --input-format")
        return replace(file, kind="parquet", compression=""), "parquet by content, not by name"
    if file.kind == "parquet":
        if actual:
            raise DataError(f"{file.path} is parquet compressed once more with {actual}, which is not read; unpack it")
        return replace(file, compression=""), None
    if not head or actual == file.compression:
        contents.require_library(actual, file.path)
        return replace(file, compression=actual), None
    if actual:
        contents.require_library(actual, file.path)
        return replace(file, compression=actual), f"compressed with {actual}, which the name does not say"
    if not contents.is_text(head):
        raise DataError(
            f"cannot read {file.path}: it begins neither as {file.compression} does nor as text: damaged; copy it again"
        )
    return replace(file, compression=""), f"not compressed, though the name says {file.compression}"


def _about(files: Sequence[InputFile], places: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """What the files are together."""
    if empty := [file.path for file in files if not file.size]:
        yield f"empty files: {listed(empty)}"
    texts = [file.path for file in files if file.kind == "text"]
    if texts and len(texts) < len(files):
        yield (
            f"beside {counted(len(files) - len(texts), 'file')} of records, {counted(len(texts), 'file')} of plain "
            f"text read as one document each: {listed(texts)}"
        )
    splits = Counter(split for split in map(_split_of, places) if split)
    if len(splits) > 1:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(splits.items()))
        yield f"splits of a data set are read together: files of {counts}; to keep them apart, name those of one"
    bare = Counter(_without_compression(file.path) for file in files)
    if twins := [path for path, count in bare.items() if count > 1]:
        yield f"read compressed and not, or compressed twice, so perhaps the same documents again: {listed(twins)}"


def _split_of(place: tuple[str, ...]) -> str | None:
    """The split that a word of a file's name, or the name of a folder above it, names."""
    *folders, name = place
    for match in (_SPLIT.search(name), *map(_SPLIT.fullmatch, reversed(folders))):
        if match is not None:
            name = match[1].lower()
            return {"val": "validation", "valid": "validation", "dev": "validation", "eval": "test"}.get(name, name)
    return None


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path


def _is_side_record(file: Found) -> bool:
    """Whether it describes a data set: of the Hugging Face hub, or one that this project has written."""
    name = file.path.name.lower()
    return name in _SIDE_RECORDS or (name.endswith(".json") and file.path.with_suffix(".idx").exists())


def _is_side_text(file: Found) -> bool:
    kind, _ = by_name(file.path.name)
    return kind in (None, "text") and _SIDE_TEXTS.fullmatch(file.path.name) is not None


def _why_not(path: Path, error: OSError) -> str:
    if path.is_symlink():
        return f"is a broken link to {os.readlink(path)}"
    if isinstance(error, FileNotFoundError):
        return "does not exist" + (": no file matches it" if any(sign in str(path) for sign in "*?[") else "")
    return f"cannot be read: {error.strerror}"
