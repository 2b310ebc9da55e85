"""The manifest of a checkpoint: every file with its size and SHA-256, and what checkpoint they belong to.

    {"version": 2, "tag": "global_step1000", "step": 1000, ..., "files": {
        "sgt_state.json": {"bytes": 2113, "sha256": "9f86d0..."}, ...}, "sha256": of all of the above}

It is written last, so a folder with a manifest was complete once. No torch: a login node reads it too.

Raises:
    OSError: from every function that reads or writes, unless it says otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout
from megatron_sgt.errors import CheckpointError
from megatron_sgt.files import commit, sha256_of, sync

VERSION = 2
_THREADS = 8

Files = dict[str, dict[str, Any]]
"""Relative path -> {"bytes": size, "sha256": hexadecimal}."""


def describe_file(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def describe_files(folder: Path, names: Iterable[str]) -> Files:
    """``describe_file`` of several files of ``folder``, a few at a time."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: describe_file(folder / name), names), strict=True))


def write_manifest(folder: Path, about: Mapping[str, Any], files: Files | None = None) -> Files:
    """Write the manifest of ``folder``. ``files``: as described by the ranks that wrote them; None: described now."""
    if files is None:
        files = describe_files(folder, layout.file_sizes(folder))
    content = {"version": VERSION, "tag": folder.name, **about, "files": dict(sorted(files.items()))}
    layout.write_json(folder / layout.MANIFEST_FILE, {**content, "sha256": digest(content)})
    return files


def commit_folder(temporary: Path, final: Path, about: Mapping[str, Any]) -> int:
    """Complete ``temporary`` with a manifest, all on disk, and rename it to ``final``; returns its size in bytes."""
    for name in layout.file_sizes(temporary):
        sync(temporary / name)
    files = write_manifest(temporary, {**about, "tag": final.name})
    commit(temporary, final)
    return sum(file["bytes"] for file in files.values())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``.

    Raises:
        CheckpointError: it is missing or has changed.
    """
    path = folder / layout.MANIFEST_FILE
    content = layout.read_json(path)
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise CheckpointError(f"{path} is damaged, or not of this version: copy the checkpoint again")
    if content.pop("sha256", None) != digest(content):
        raise CheckpointError(f"{path} is damaged: its checksum does not match; copy the checkpoint again")
    return content


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of JSON-able content, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def size_problems(folder: Path) -> list[str]:
    """The files of ``folder`` that are missing or have another size than when it was saved, one line each.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    listed: Files = read_manifest(folder)["files"]
    actual = layout.file_sizes(folder)
    missing = [f"{name} is missing" for name in listed if name not in actual]
    return missing + [
        f"{name} has {actual[name]} bytes instead of {file['bytes']}"
        for name, file in listed.items()
        if name in actual and actual[name] != file["bytes"]
    ]


def checksum_problems(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """As ``size_problems``, and the files whose bytes have changed since they were saved.

    Args:
        part, parts: read every ``parts``-th file from number ``part`` on, so that ranks can share the work.
    """
    problems = size_problems(folder)
    if problems:
        return problems
    listed: Files = read_manifest(folder)["files"]
    names = list(listed)[part::parts]
    try:
        found = describe_files(folder, names)
    except OSError as error:
        return [f"{error.filename} cannot be read: {error.strerror}"]
    return [f"{name} has changed since it was saved" for name in names if found[name] != listed[name]]


def verify_sizes(folder: Path) -> None:
    """Refuse a ``folder`` whose files have changed in size.

    Raises:
        CheckpointError: naming the files that are missing or have another size.
    """
    refuse(folder, size_problems(folder))


def verify_checksums(folder: Path) -> None:
    """Refuse a ``folder`` whose files have changed.

    Raises:
        CheckpointError: naming the files that are missing or not as they were saved.
    """
    refuse(folder, checksum_problems(folder))


def refuse(folder: Path, problems: list[str]) -> None:
    """Refuse ``folder`` if there are ``problems``.

    Raises:
        CheckpointError: there are some.
    """
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {'; '.join(problems[:5])}{more}. Copy it again; to go back to an "
            f"older one write its name into {folder.parent / layout.LATEST_FILE}"
        )
