"""Rules of normalisation as sentencepiece compiles them, and a regular expression that finds any of many texts."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

import numpy as np

_LEAF = 1 << 31


def read_charsmap(compiled: bytes) -> dict[str, str]:
    """The rules: what is replaced, and by what.

    The format: the size of a double array (darts-clone), the array, and the replacements, each ended by a zero byte.
    """
    if not compiled:
        return {}
    (size,) = struct.unpack_from("<I", compiled)
    units = np.frombuffer(compiled, dtype="<u4", count=size // 4, offset=4).astype(np.int64)
    texts = compiled[4 + size :]
    places = np.arange(units.size)
    # A child's place is its parent's base, with its label (a byte) exclusively or-ed.
    labels = np.where(units & _LEAF, 0, units & 0xFF)
    children = np.nonzero(labels)[0]
    children = children[np.argsort(children ^ labels[children], kind="stable")]
    bases = children ^ labels[children]
    rules: dict[str, str] = {}
    nodes, prefixes = places[:1], [b""]
    while nodes.size:
        base = nodes ^ _offset(units[nodes])
        first, last = np.searchsorted(bases, base, "left"), np.searchsorted(bases, base, "right")
        counts = last - first
        rows = np.repeat(np.arange(nodes.size), counts)
        found = children[np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts) + first[rows]]
        prefixes = [
            prefixes[row] + bytes((label,)) for row, label in zip(rows.tolist(), labels[found].tolist(), strict=True)
        ]
        nodes = found
        ends = np.nonzero(units[nodes] >> 8 & 1)[0]
        values = units[nodes[ends] ^ _offset(units[nodes[ends]])] & (_LEAF - 1)
        for index, value in zip(ends.tolist(), values.tolist(), strict=True):
            rules[prefixes[index].decode()] = texts[value : texts.index(b"\0", value)].decode()
    return rules


def _offset(units: Any) -> Any:
    return (units >> 10) << ((units & (1 << 9)) >> 6)


def alternation(texts: Iterable[str]) -> str:
    """A regular expression that matches the longest of ``texts`` (none empty) at a place."""
    root: dict[str, Any] = {}
    for text in texts:
        node = root
        for character in text:
            node = node.setdefault(character, {})
        node[""] = {}
    return _pattern(root)


def _pattern(node: dict[str, Any]) -> str:
    """What follows in the tree of texts; characters with the same continuation share it."""
    groups: dict[str, list[str]] = {}
    for character, child in node.items():
        if character:
            groups.setdefault(_pattern(child), []).append(character)
    branches = [character_class(characters) + rest for rest, characters in groups.items()]
    if not branches:
        return ""
    pattern = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
    return pattern + "?" * ("" in node)


def character_class(characters: Iterable[str]) -> str:
    """A class of characters, neighbours as ranges."""
    codes = sorted({ord(character) for character in characters})
    ranges: list[list[int]] = []
    for code in codes:
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    body = "".join(f"\\x{{{a:x}}}" + (f"-\\x{{{b:x}}}" if b > a else "") for a, b in ranges)
    return body if len(codes) == 1 else f"[{body}]"
