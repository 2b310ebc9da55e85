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
    rules: dict[str, str] = {}
    nodes, prefixes = np.zeros(1, np.int64), [b""]
    labels = np.arange(1, 256)
    while nodes.size:
        children = (nodes ^ _offset(units[nodes]))[:, None] ^ labels
        inside = children < units.size
        found = np.where(inside, units[np.where(inside, children, 0)], _LEAF)
        rows, columns = np.nonzero((found & (_LEAF | 0xFF)) == labels)
        nodes = children[rows, columns]
        prefixes = [
            prefixes[row] + bytes([label]) for row, label in zip(rows.tolist(), labels[columns].tolist(), strict=True)
        ]
        ends = (units[nodes] >> 8 & 1).astype(bool)
        values = units[(nodes ^ _offset(units[nodes]))[ends]] & (_LEAF - 1)
        for index, value in zip(np.nonzero(ends)[0].tolist(), values.tolist(), strict=True):
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
