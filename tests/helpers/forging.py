"""Files of checkpoints edited by hand, with and without their checksums made anew."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout, manifest
from tests.helpers.checkpoints import GROWN_STEP, write_grown_checkpoint

OLDER, NEWER = layout.tag_for(GROWN_STEP), layout.tag_for(GROWN_STEP + 2)

DEEP = "[" * 100_000 + "]" * 100_000
VALUES: dict[str, Any] = {
    "null": None, "list": [], "object": {}, "text": "x", "negative": -1, "huge": 10**400, "NaN": math.nan,
    "fraction": 1.5, "true": True, "nested": [[[[[0]]]]],
}  # fmt: skip
"""What may stand where something else was saved."""


def write_pair(root: Path) -> Path:
    """Two checkpoints of a grown model in ``root``, the newer one named by ``latest``; returns it."""
    older = write_grown_checkpoint(root)
    newer = older.with_name(NEWER)
    shutil.copytree(older, newer)
    state = layout.read_json(newer / layout.STATE_FILE)
    state["trainer"]["step"] = state["hooks"]["growth"]["schedule"]["step"] = GROWN_STEP + 2
    layout.write_json(newer / layout.STATE_FILE, state)
    for folder in (older, newer):
        signed(folder)
    layout.point_to(root, newer.name)
    return newer


def signed(folder: Path) -> None:
    """Make the manifest anew, over whatever lies in ``folder``, with all that a save says in it."""
    step = layout.step_of(folder.name)
    where = {"tensor_model_parallel_size": 2, "data_parallel_size": 1, "zero_stage": 1}
    about = {"step": step, "tokens": 64 * step, "layout": where, "tokenizer": None, "run": "r", "code": "c"}
    manifest.write_manifest(folder, about)


def signed_again(folder: Path, name: str) -> None:
    """Make the entry of one file in the manifest anew."""
    content = layout.read_json(folder / layout.MANIFEST_FILE)
    del content["sha256"]
    content["files"][name] = manifest.describe_file(folder / name)
    write_signed(folder, content)


def write_signed(folder: Path, content: Any) -> None:
    """Write ``content`` as a manifest that carries the right checksum of itself, if it can carry one."""
    if isinstance(content, dict):
        content = {**content, "sha256": manifest.digest(content)}
    layout.write_json(folder / layout.MANIFEST_FILE, content)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of everything in a JSON value; of a list only of its first element."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from places(value[0], (*path, 0))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of ``value`` in which ``new`` stands at ``path``."""
    if not path:
        return new
    changed = json.loads(json.dumps(value))
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = new
    return changed


Edit = Callable[[Path], None]


def replaced(by: bytes) -> Edit:
    return lambda path: path.write_bytes(by) and None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def linked_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def key_twice(path: Path) -> None:
    text = path.read_text()
    first = text.lstrip().partition("\n")[2].partition("\n")[0]  # the first line with a key
    path.write_text(text.replace(first, f"{first}\n{first}", 1))


EDITS: dict[str, Edit] = {
    "cut": cut,
    "empty": replaced(b""),
    "flipped": flipped,
    "not UTF-8": replaced(b"\xff\xfe\x00"),
    "deep": replaced(DEEP.encode()),
    "ten thousand digits": replaced(b"1" * 10_000),
    "tagged": replaced(b"!!python/object/apply:os.mkdir [executed]\n"),
    "a tag's wrong text": replaced(b"model: !!bool perhaps\n"),
    "key twice": key_twice,
    "folder": as_folder,
    "link to nowhere": linked_nowhere,
}

LATEST: dict[str, Edit] = {
    "not UTF-8": replaced(b"\xff\xfe"),
    "elsewhere": replaced(b"../../elsewhere"),
    "endless": replaced(b"x" * (1 << 20)),
    "lines": replaced(b"a\nb\n"),
    "a step of many digits": replaced(b"global_step" + b"9" * 5000),
    "folder": as_folder,
    "link to nowhere": linked_nowhere,
}
