r"""Megatron's indexed data sets on disk: finding them, and finding damage before training does.

PREFIX.bin holds the tokens of all sequences back to back. PREFIX.idx holds, little-endian: the 9 bytes
``MMIDIDX\0\0``, version 1 (uint64), dtype code (uint8), number of sequences n (uint64), number of document
boundaries m (uint64), the lengths (int32[n]), the byte offsets (int64[n]) and the boundaries (int64[m], from
0). PREFIX.json, which only this project writes, says which tokenizer the ids come from.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sgt.errors import DataError, first_line

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<QBQQ")
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

CHECKED_TOKENS = 1 << 25
"""Up to this many tokens all ids are checked; of a larger set, an even sample of this size."""
_WINDOW = 1 << 20
_DIGEST_BLOCKS, _DIGEST_BLOCK = 64, 1 << 13


@dataclass(frozen=True)
class IndexedInfo:
    """What one .bin/.idx pair holds."""

    prefix: str
    sequences: int
    documents: int
    tokens: int
    dtype: str
    lengths_digest: str
    """SHA-256 of the sequence lengths, on which alone the order of the samples depends."""


def check_indexed_dataset(
    prefix: str,
    vocab_size: int | None = None,
    tokenizer_fingerprint: str | None = None,
    add_bos: bool | None = None,
) -> IndexedInfo:
    """Compare the files of ``prefix`` with each other and, if given, with vocabulary, tokenizer, and its add_bos.

    Raises:
        DataError: not an index, truncated .idx or .bin, a .bin that belongs to another .idx, a token id outside
            0..vocab_size-1 (all ids up to CHECKED_TOKENS, else a sample), another tokenizer than PREFIX.json names, or
            documents that begin otherwise.
    """
    dtype, lengths, boundaries = _read_index(prefix)
    tokens = int(lengths.sum(dtype=np.int64))
    expected = tokens * dtype.itemsize
    actual = Path(prefix + ".bin").stat().st_size
    if actual < expected:
        raise DataError(
            f"{prefix}.bin is truncated: it has {actual:,} bytes, its index describes {expected:,}; "
            "copy it again or run tools/preprocess_data.py again"
        )
    if actual > expected:
        raise DataError(
            f"{prefix}.bin has {actual:,} bytes but {prefix}.idx describes {expected:,}: "
            "the two files do not belong together; copy both again"
        )
    metadata = read_metadata(prefix)
    made_with = metadata.get("tokenizer_fingerprint")
    if tokenizer_fingerprint is not None and made_with not in (None, tokenizer_fingerprint):
        raise DataError(
            f"{prefix} was tokenized with {metadata.get('tokenizer')} (sha256 {made_with[:12]}…), but "
            f"data.tokenizer is another one (sha256 {tokenizer_fingerprint[:12]}…); set data.tokenizer to "
            "the former, or run tools/preprocess_data.py again"
        )
    if add_bos is not None and metadata and add_bos != bool(metadata.get("add_bos")):
        raise DataError(_other_beginning(prefix, add_bos))
    if vocab_size is not None and tokens:
        _check_ids(prefix, dtype, tokens, vocab_size)
    return IndexedInfo(prefix, len(lengths), len(boundaries) - 1, tokens, dtype.name, lengths_digest(lengths))


def _other_beginning(prefix: str, wanted: bool) -> str:
    made, other = ("do not begin", "with") if wanted else ("begin", "without")
    return (
        f"the documents of {prefix} {made} with the beginning-of-text token, but data.tokenizer.add_bos is "
        f"{str(wanted).lower()}: set it to {str(not wanted).lower()}, or run tools/preprocess_data.py again {other} "
        "--add-bos"
    )


def lengths_digest(lengths: np.ndarray) -> str:
    """SHA-256 of the lengths of sequences (int32)."""
    return hashlib.sha256(np.ascontiguousarray(lengths).data).hexdigest()


def content_digest(prefix: str, tokens: int) -> str:
    """SHA-256 of an even sample of the first ``tokens`` ids of a data set, at most _DIGEST_BLOCKS blocks.

    It tells data sets apart whose lengths are the same, and does not depend on the width in which ids are stored.

    Raises:
        DataError: the index is damaged, or the tokens are not all there.
    """
    if tokens == 0:
        return hashlib.sha256().hexdigest()
    dtype = _read_index(prefix)[0]
    try:
        ids = np.memmap(prefix + ".bin", dtype=dtype, mode="r", shape=(tokens,))
    except (OSError, ValueError) as error:  # cut off since its index was written
        raise DataError(f"{prefix}.bin cannot be read: {first_line(error)}; copy it again") from error
    digest = hashlib.sha256()
    blocks = min(_DIGEST_BLOCKS, -(-tokens // _DIGEST_BLOCK))
    for start in np.linspace(0, max(0, tokens - _DIGEST_BLOCK), blocks).astype(np.int64):
        digest.update(ids[start : start + _DIGEST_BLOCK].astype("<i8").data)
    return digest.hexdigest()


def sequence_lengths(prefix: str) -> np.ndarray:
    """Tokens in each sequence: int32 [sequences], mapped from disk.

    Raises:
        DataError: the index is damaged.
    """
    return _read_index(prefix)[1]


def document_boundaries(prefix: str) -> np.ndarray:
    """Where documents begin, in sequences, and where the last one ends: int64 [documents + 1], mapped from disk.

    Raises:
        DataError: the index is damaged.
    """
    return _read_index(prefix)[2]


def read_metadata(prefix: str) -> dict[str, Any]:
    """The content of PREFIX.json; empty if there is none, as for data sets made by Megatron itself."""
    try:
        return json.loads(Path(prefix + ".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(
            f"{prefix}.json is damaged ({error}); delete it or run tools/preprocess_data.py again"
        ) from error


def _read_index(prefix: str) -> tuple[np.dtype, np.ndarray, np.ndarray]:
    path = Path(prefix + ".idx")
    try:
        with path.open("rb") as stream:
            magic, header = stream.read(len(MAGIC)), stream.read(HEADER.size)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if magic != MAGIC or len(header) != HEADER.size:
        raise DataError(
            f"{path} is not a Megatron index (it begins with {magic!r}, {path.stat().st_size:,} bytes); "
            "run tools/preprocess_data.py again"
        )
    version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise DataError(f"{path} has version {version} and dtype code {code}; known: version 1, codes {sorted(DTYPES)}")
    start = len(MAGIC) + HEADER.size
    needed = start + 12 * num_sequences + 8 * num_boundaries
    if path.stat().st_size < needed:
        raise DataError(
            f"{path} is truncated: it has {path.stat().st_size:,} bytes, its header describes {needed:,}; "
            "copy it again or run tools/preprocess_data.py again"
        )
    raw = np.memmap(path, mode="r")
    lengths = raw[start : start + 4 * num_sequences].view("<i4")
    boundaries = raw[needed - 8 * num_boundaries : needed].view("<i8")
    if num_boundaries < 1 or boundaries[-1] != num_sequences or (num_sequences and lengths.min() < 0):
        raise DataError(f"{path} is damaged: its document boundaries or lengths are inconsistent; copy it again")
    return np.dtype(DTYPES[code]), lengths, boundaries


def _check_ids(prefix: str, dtype: np.dtype, tokens: int, vocab_size: int) -> None:
    ids = np.memmap(prefix + ".bin", dtype=dtype, mode="r", shape=(tokens,))
    num_windows = -(-min(tokens, CHECKED_TOKENS) // _WINDOW)
    starts = np.linspace(0, max(0, tokens - _WINDOW), num_windows).astype(np.int64)
    for start in starts:
        window = ids[start : start + _WINDOW]
        for bad in (int(window.max()), int(window.min())):
            if not 0 <= bad < vocab_size:
                raise DataError(
                    f"{prefix}.bin holds token id {bad}, but the vocabulary has {vocab_size} ids: it was "
                    "made with another tokenizer; set data.tokenizer (or model.vocab_size) to the one it was "
                    "made with"
                )
