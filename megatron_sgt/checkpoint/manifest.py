"""The manifest of a checkpoint: every file with its size and SHA-256, and what checkpoint they belong to.

    {"version": 2, "tag": "global_step1000", "step": 1000, ..., "files": {
        "sgt_state.json": {"bytes": 2113, "sha256": "9f86d0...", "sample": "60303a..."}, ...},
     "sha256": of all of the above}

A file that one rank has written has its "rank" too. "sample" is the checksum of a few pieces of the file
(``files.sample_of``): reading them is enough to see that a file is not the one that was saved. Manifests of older
versions lack it, and "run", which is the same in all checkpoints of a run.

It is written last, so a folder with a manifest was complete once. No torch: a login node reads it too.

Raises:
    OSError: from every function that reads or writes, unless it says otherwise.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.forms import FormError, fields, known_layout, whole
from megatron_sgt.errors import CheckpointError, DamagedCheckpointError
from megatron_sgt.files import commit, sample_of, sha256_of, sync

VERSION = 2
_THREADS = 8
_HASH = re.compile(r"[0-9a-f]{64}")

T = TypeVar("T")

Files = dict[str, dict[str, Any]]
"""Relative path -> {"bytes": size, "sha256": hexadecimal, "sample": hexadecimal}; "rank" of a rank's own file."""


def describe_file(path: Path) -> dict[str, Any]:
    """Size, SHA-256 and sample of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path), "sample": sample_of(path)}


def describe_files(folder: Path, names: Iterable[str]) -> Files:
    """``describe_file`` of several files of ``folder``, a few at a time."""
    return _of_each(folder, names, describe_file)


def _of_each(folder: Path, names: Iterable[str], what: Callable[[Path], T]) -> dict[str, T]:
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: what(folder / name), names), strict=True))


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
        raise DamagedCheckpointError(f"{path} is damaged, or not of this version: copy the checkpoint again")
    if content.pop("sha256", None) != digest(content):
        raise DamagedCheckpointError(f"{path} is damaged: its checksum does not match; copy the checkpoint again")
    try:
        _check_form(content)
    except FormError as error:
        raise DamagedCheckpointError(f"{path} is damaged: {error}; copy the checkpoint again") from error
    own = content.get("step")
    if (named := layout.named_step(folder.name)) is not None and own is not None and named != own:
        raise DamagedCheckpointError(
            f"checkpoint {folder} was saved at step {own}: the folder was renamed; give it back its name "
            f"{layout.tag_for(own)}"
        )
    return content


def _check_form(content: Mapping[str, Any]) -> None:
    """Whether ``write_manifest`` can have written it."""
    for name, about in fields(content.get("files"), "files").items():
        if not name.isprintable() or name.startswith("/") or ".." in Path(name).parts:
            raise FormError(f"{ascii(name)[:60]} is no name of a file inside the checkpoint")
        entry = fields(about, f"files.{name}")
        whole(entry.get("bytes"), f"files.{name}.bytes")
        for key in ("sha256", "sample"):
            value = entry.get(key)
            if not (_HASH.fullmatch(value) if isinstance(value, str) else key == "sample" and key not in entry):
                raise FormError(f"files.{name}.{key} is no checksum")
        whole(entry.get("rank", 0), f"files.{name}.rank")
    for key in ("step", "tokens"):
        whole(content.get(key, 0), key)
    for key in ("tag", "run", "tokenizer", "growth", "config_sha256", "code", "source"):
        if not isinstance(content.get(key, ""), str | None):
            raise FormError(f"{key} is no text")
    fields(content.get(layout.ORIGIN_STATE, {}), layout.ORIGIN_STATE)
    known_layout(content.get("layout"), "layout")


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
        found = _of_each(folder, names, sha256_of)
    except OSError as error:
        return [f"{error.filename} cannot be read: {error.strerror}"]
    return [f"{name} has changed since it was saved" for name in names if found[name] != listed[name]["sha256"]]


def sample_problems(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """As ``checksum_problems``, from a few pieces of every file: finds a file that is another one of the same size.

    Files of manifests of older versions, which hold no samples, are passed over.
    """
    problems = size_problems(folder)
    if problems:
        return problems
    listed: Files = read_manifest(folder)["files"]
    names = [name for name in list(listed)[part::parts] if "sample" in listed[name]]
    try:
        found = _of_each(folder, names, sample_of)
    except OSError as error:
        return [f"{error.filename} cannot be read: {error.strerror}"]
    return [f"{name} is not the file that was saved" for name in names if found[name] != listed[name]["sample"]]


def without_samples(folder: Path) -> bool:
    """Whether an older version has written ``folder``: a swapped file of the same size has another checksum only.

    Raises:
        CheckpointError: the manifest cannot be read.
    """
    return not all("sample" in file for file in read_manifest(folder)["files"].values())


def run_of(root: Path) -> str | None:
    """What the newest readable checkpoint of ``root`` says of its run; None without one, or from an older version."""
    for tag in reversed(layout.finished_tags(root)):
        with contextlib.suppress(CheckpointError):
            return read_manifest(root / tag).get("run")
    return None


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
        raise DamagedCheckpointError(
            f"checkpoint {folder} is damaged: {'; '.join(problems[:5])}{more}. Copy it again; to go back to an "
            f"older one write its name into {folder.parent / layout.LATEST_FILE}"
        )
