"""A corpus of real text that exists on every machine: the sources of Python's standard library."""

import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sgt.errors import DataError
from megatron_sgt.files import replacing

MIN_BYTES = 5_000_000
NEVER = frozenset({"site-packages", "dist-packages", "__pycache__", "node_modules"})
TESTS = frozenset({"test", "tests", "idle_test"})


@dataclass(frozen=True)
class CorpusReport:
    """What was written."""

    path: str
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents."""
    with_tests: bool
    left_out: int
    """Source files that cannot be read, or are no text in the coding that they declare."""


def build_corpus(
    output: str, min_bytes: int = MIN_BYTES, overwrite: bool = False, root: str | None = None
) -> CorpusReport:
    """Write ``output`` as jsonl ({"text": …}), one document per source file, in sorted order.

    Installed packages are omitted, and so is the library's own test suite unless the rest is smaller than
    ``min_bytes``. Files that cannot be decoded are left out and counted. ``root``: a folder instead of the
    standard library's.

    Raises:
        DataError: the text is too small even then, a folder cannot be read, or ``output`` exists and may not be
            overwritten.
    """
    target = Path(output)
    if target.exists() and not overwrite:
        raise DataError(f"{output} exists already; choose another name or give --overwrite")
    folder = Path(root or sysconfig.get_path("stdlib"))
    for with_tests in (False, True):
        read = [_read(path) for path in _sources(folder, with_tests)]
        documents = [text for text in read if text]
        size = sum(len(text.encode()) for text in documents)
        if size >= min_bytes:
            break
    else:
        raise DataError(
            f"the Python sources in {folder} hold {size:,} bytes of text, fewer than {min_bytes:,}; "
            "install the full standard library, or bring a corpus of your own"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as stream:
        for text in documents:
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return CorpusReport(output, len(documents), size, with_tests, read.count(None))


def _sources(folder: Path, with_tests: bool) -> Iterator[Path]:
    excluded = NEVER if with_tests else NEVER | TESTS
    found = []
    for directory, subdirectories, names in os.walk(folder, onerror=_refuse):
        subdirectories[:] = [name for name in subdirectories if name not in excluded]
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return iter(sorted(found, key=lambda path: path.relative_to(folder).parts))


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _read(path: Path) -> str | None:
    try:
        with tokenize.open(path) as stream:  # honours coding declarations
            text = stream.read()
        text.encode()
    except (SyntaxError, UnicodeError, OSError):
        return None
    return text
