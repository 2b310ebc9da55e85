"""Writes Megatron's indexed data sets (their format: indexed.py) piece by piece, in memory that does not grow.

The lengths of the sequences go to disk as they come, where they stand in the index; what follows from them is added at
the end. So a killed process leaves files that another one goes on with.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sgt.data.encoding import EncodedKey
from megatron_sgt.data.indexed import DTYPES, HEADER, MAGIC
from megatron_sgt.errors import DataError
from megatron_sgt.files import commit, sync, temporary_of

LENGTHS_AT = len(MAGIC) + HEADER.size
_BLOCK = 1 << 20
"""Sequences, or bytes, that are in memory at a time."""


@dataclass(frozen=True)
class Written:
    """How much of a data set is written."""

    documents: int = 0
    tokens: int = 0
    empty: int = 0
    """Documents without any token, left out."""


class DatasetWriter:
    """Writes one .bin/.idx pair (and its .json) under temporary names; ``commit`` renames them.

    A context manager: without a commit, what was written is removed, or left for ``written`` of another process.

    Args:
        prefix: of the data set.
        dtype: in which ids are stored, a value of ``indexed.DTYPES``.
        overwrite: whether an existing data set may be replaced.
        written: what an earlier process has left, to go on with; None: begin anew, over whatever is left.
        keep: leave what was written, without a commit.

    Raises:
        DataError: the data set exists and may not be overwritten, another process is writing it, or less of it is left
            than ``written``.
    """

    def __init__(
        self, prefix: str, dtype: str, overwrite: bool, written: Written | None = None, keep: bool = False
    ) -> None:
        existing = [prefix + suffix for suffix in (".bin", ".idx") if Path(prefix + suffix).exists()]
        if existing and not overwrite:
            raise DataError(f"{' and '.join(existing)} exists already; choose another prefix or give --overwrite")
        self.prefix = prefix
        self._dtype = np.dtype(dtype)
        self._keep = keep
        self._temporary = {suffix: temporary_of(Path(prefix + suffix)) for suffix in (".bin", ".json", ".idx")}
        start = written or Written()
        self.documents, self.tokens, self.empty = start.documents, start.tokens, start.empty
        try:
            Path(prefix).parent.mkdir(parents=True, exist_ok=True)
            self._index = _locked(self._temporary[".idx"])
            self._tokens = _opened(self._temporary[".bin"])
        except OSError as error:
            raise DataError(f"cannot write {error.filename}: {error.strerror}") from error
        self._cut(".bin", self._tokens, start.tokens * self._dtype.itemsize)
        self._cut(".idx", self._index, LENGTHS_AT + 4 * start.documents)

    def _cut(self, suffix: str, stream: Any, size: int) -> None:
        """Leave the first ``size`` bytes of ``stream``, and go on behind them."""
        there = os.fstat(stream.fileno()).st_size
        if there < size and self.documents:
            self.close()
            raise DataError(
                f"{self._temporary[suffix]} has {there:,} bytes of {size:,} that were written to it; start again "
                "without --resume"
            )
        stream.truncate(size)
        stream.seek(size)

    @property
    def written(self) -> Written:
        return Written(self.documents, self.tokens, self.empty)

    def add(self, encoded: EncodedKey) -> None:
        """Append documents of one sequence each."""
        self._tokens.write(np.ascontiguousarray(encoded.tokens, self._dtype.newbyteorder("<")).data)
        self._index.write(np.ascontiguousarray(encoded.lengths, "<i4").data)
        self.documents += len(encoded.lengths)
        self.tokens += len(encoded.tokens)
        self.empty += encoded.num_empty

    def append(self, prefix: str, lengths: np.ndarray, tokens: int) -> None:
        """Append all sequences of the data set ``prefix``, whose ids are stored in the same width."""
        with open(prefix + ".bin", "rb") as stream:
            shutil.copyfileobj(stream, self._tokens, _BLOCK)
        for start in range(0, len(lengths), _BLOCK):
            self._index.write(np.ascontiguousarray(lengths[start : start + _BLOCK], "<i4").data)
        self.documents += len(lengths)
        self.tokens += tokens

    def save(self) -> None:
        """Return when all that was written is on disk."""
        for stream in (self._tokens, self._index):
            stream.flush()
            os.fsync(stream.fileno())

    def commit(self, metadata: dict[str, Any] | None, boundaries: Iterable[np.ndarray] | None = None) -> None:
        """Make the data set readable. May be repeated by another process, if this one is killed meanwhile.

        metadata: of its .json beside documents and tokens; None: it has none. boundaries: of the documents in
            sequences, from 0 (int64, in pieces); None: one sequence each.
        """
        self._finish(boundaries if boundaries is not None else _every(self.documents + 1))
        if metadata is not None:
            record = {"documents": self.documents, "tokens": self.tokens, **metadata}
            self._temporary[".json"].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            sync(self._temporary[".json"])
        self.save()
        # The index goes first and comes last: without it the other files are not a data set.
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        if metadata is None:  # nor what another process has left of one
            for path in (Path(self.prefix + ".json"), self._temporary[".json"]):
                path.unlink(missing_ok=True)
        for suffix, path in self._temporary.items():
            if path.exists():
                commit(path, Path(self.prefix + suffix))

    def _finish(self, boundaries: Iterable[np.ndarray]) -> None:
        """Write the offsets, the boundaries and the header of the index."""
        stream, sequences = self._index, self.documents
        stream.flush()
        stream.seek(LENGTHS_AT + 4 * sequences)
        before = 0
        for start in range(0, sequences, _BLOCK):
            size = 4 * min(_BLOCK, sequences - start)
            lengths = np.frombuffer(os.pread(stream.fileno(), size, LENGTHS_AT + 4 * start), "<i4")
            ends = lengths.cumsum(dtype="<i8") + before
            offsets = np.concatenate([np.array([before], "<i8"), ends[:-1]]) * self._dtype.itemsize
            stream.write(offsets.data)
            before = int(ends[-1])
        count = 0
        for piece in boundaries:
            stream.write(np.ascontiguousarray(piece, "<i8").data)
            count += len(piece)
        code = next(code for code, name in DTYPES.items() if name == self._dtype.name)
        stream.truncate()
        stream.seek(0)
        stream.write(MAGIC + HEADER.pack(1, code, sequences, count))

    def close(self) -> None:
        """Leave the files as they are."""
        try:
            self._tokens.close()
        finally:
            self._index.close()  # and with it the lock

    def __enter__(self) -> "DatasetWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._keep:
            for path in self._temporary.values():
                path.unlink(missing_ok=True)
        self.close()


def finish(prefix: str, dtype: str, written: Written, metadata: dict[str, Any]) -> None:
    """Commit a data set that a killed process had written to its end, or has begun to commit.

    Raises:
        DataError: its files are not those that the process has left.
    """
    if not temporary_of(Path(prefix + ".idx")).exists():  # it has its name, which comes last
        if not Path(prefix + ".idx").exists():
            raise DataError(f"{prefix}.idx is gone; start again without --resume")
        return
    tokens = temporary_of(Path(prefix + ".bin"))
    if not tokens.exists():
        os.rename(prefix + ".bin", tokens)
    with DatasetWriter(prefix, dtype, True, written, keep=True) as writer:
        writer.commit(metadata)


def _every(count: int) -> Iterator[np.ndarray]:
    for start in range(0, count, _BLOCK):
        yield np.arange(start, min(count, start + _BLOCK))


def _opened(path: Path) -> Any:
    """``path`` for writing and reading, as it is; made if there is none."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=_BLOCK)


def _locked(path: Path) -> Any:
    """As ``_opened``, locked while it is open: two jobs must not write one file."""
    stream = _opened(path)
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Else it has got its name from the other process between these two lines, and is complete.
        held = path.exists() and os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except BlockingIOError:
        held = False
    except OSError:
        held = True  # a file system without locks
    if not held:
        stream.close()
        raise DataError(f"another process is writing {path}; wait for it or choose another prefix")
    return stream
