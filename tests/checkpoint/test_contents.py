"""What the contents of checkpoints are read as: whole, damaged, unfinished, copies, growth, imports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.contents import is_checkpoint, read_contents, read_root
from megatron_sgt.checkpoint.manifest import size_problems
from megatron_sgt.errors import CheckpointError
from tests.helpers.checkpoints import GROWN_STEP, write_grown_checkpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of one grown checkpoint, which ``latest`` names."""
    write_grown_checkpoint(tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def only(root: Path) -> Path:
    return root / layout.tag_for(GROWN_STEP)


def test_reads_step_layout_and_growth(root: Path) -> None:
    found = read_contents(only(root), size_problems)
    assert (found.status, found.problems) == ("complete", ())
    details = found.details
    assert details is not None and details.layout is not None
    assert (details.step, details.samples, details.tokens) == (GROWN_STEP, 14, 14 * 32)
    assert details.layout["tensor_model_parallel_size"] == 2
    growth = details.growth
    assert (growth.method, growth.phase, growth.window_end) == ("sgt", "selecting", 8)
    deep, shallow = growth.layers
    assert (deep.layer, deep.depth, deep.kept_heads, deep.selected_at, deep.other_gate) == (
        3,
        2,
        (0, 3),
        2,
        0.0,
    )
    assert (shallow.layer, shallow.depth, shallow.kept_heads, shallow.selected_at) == (1, 1, (1, 2), 6)
    assert shallow.other_gate == pytest.approx(0.5)
    json.dumps(found.to_dict())


def drop(folder: Path) -> None:
    next(folder.glob("*.pt")).unlink()


def cut(folder: Path) -> None:
    file = next(folder.glob("*.pt"))
    file.write_bytes(file.read_bytes()[:-1])


def spoil_state(folder: Path) -> None:
    _spoil(folder / layout.STATE_FILE, b"{", b"[")


def spoil_manifest(folder: Path) -> None:
    (folder / layout.MANIFEST_FILE).write_text("[]")


def _spoil(file: Path, old: bytes, new: bytes) -> None:
    file.write_bytes(file.read_bytes().replace(old, new, 1))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop, "is missing"),
        (cut, "bytes instead of"),
        (spoil_state, "cannot be read"),
        (spoil_manifest, "damaged"),
    ],
)
def test_damage_is_named(root: Path, damage: Any, says: str) -> None:
    damage(only(root))
    found = read_root(root, size_problems)
    (one,) = found.checkpoints
    assert one.status == "damaged" and says in "; ".join(one.problems)


def test_a_root_tells_unfinished_saves_copies_and_the_latest(root: Path) -> None:
    shutil.copytree(only(root), root / "global_step8.tmp")
    shutil.copytree(only(root), root / f"{only(root).name}.universal")
    found = read_root(root, size_problems)
    assert [(c.folder.name, c.status, c.copy, c.is_latest) for c in found.checkpoints] == [
        ("global_step7", "complete", False, True),
        ("global_step7.universal", "complete", True, False),
        ("global_step8.tmp", "unfinished", False, False),
    ]
    assert found.problem is None


def test_a_latest_that_names_nothing_is_a_problem(root: Path) -> None:
    (root / layout.LATEST_FILE).write_text("global_step9")
    found = read_root(root, size_problems)
    assert found.latest is None and found.problem is not None and "'global_step9'" in found.problem


def test_growth_may_not_have_begun(root: Path) -> None:
    file = only(root) / layout.STATE_FILE
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "hooks": {}}))
    details = read_contents(only(root), size_problems).details
    assert details is not None and (details.growth.phase, details.growth.layers) == ("vanilla", ())


def test_what_is_a_checkpoint(root: Path, tmp_path: Path) -> None:
    assert is_checkpoint(only(root)) and not is_checkpoint(root) and not is_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no whole checkpoint at"):
        read_root(tmp_path, size_problems)
