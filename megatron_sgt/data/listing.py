"""Lists of files in one line."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from megatron_sgt.data.contents import COMPRESSIONS

_NOT_READ = (".lz4", ".br", ".bgz", ".z", ".snappy", ".sz", ".zip", ".7z", ".rar")
"""Compressions that no command reads."""
_NAMED = 3
"""So many names stand in a line, and the number of the others."""
_LISTED = 10
"""So many suffixes stand in a line."""


def list_left_out(unknown: Sequence[Path], side: Sequence[Path], others: Sequence[tuple[Path, str]]) -> str:
    """What a search has left out: files of unknown suffix, those that describe a data set, and (path, reason).

    "3 .json.lz4, 1 .csv, 2 side files of a data set (README.md, LICENSE), 1 hidden (.git)"
    """
    suffixes = Counter(suffix for path in unknown if (suffix := _suffix(path.name)))
    shown = suffixes.most_common(_LISTED)
    parts = [f"{count} {suffix}" for suffix, count in shown]
    if rest := suffixes.total() - sum(count for _, count in shown):
        parts.append(f"{rest} with other suffixes")
    if bare := [path.name for path in unknown if not _suffix(path.name)]:
        parts.append(f"{len(bare)} without suffix ({listed(bare)})")
    if side:
        parts.append(f"{counted(len(side), 'side file')} of a data set ({listed([path.name for path in side])})")
    for reason in sorted({reason for _, reason in others}):
        paths = [path for path, why in others if why == reason]
        names = [path.name if reason == "hidden" else str(path) for path in paths]
        parts.append(
            f"{counted(len(paths), reason) if reason != 'hidden' else f'{len(paths)} hidden'} ({listed(names)})"
        )
    return ", ".join(parts)


def _suffix(name: str) -> str:
    """The suffix of a name, with the one before it if the last is a compression: ``.csv``, ``.jsonl.lz4``."""
    inner, suffix = os.path.splitext(name)
    if suffix.lower() in _NOT_READ or suffix.lower() in COMPRESSIONS:
        suffix = os.path.splitext(inner)[1] + suffix
    return suffix


def counted(number: int, noun: str) -> str:
    """``1 file``, ``2 files``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def listed(names: Sequence[object]) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - _NAMED
    return ", ".join(map(str, names[:_NAMED])) + (f" and {rest:,} more" if rest > 0 else "")
