"""A save counts when it is whole, and until then the one before it counts: killed at any point."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint import layout, save
from megatron_sgt.checkpoint.save import layout_of, save_checkpoint
from megatron_sgt.config import Config, load_config
from megatron_sgt.errors import CheckpointError
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config

STATE = {"trainer": {"step": 2}, "hooks": {}}


class Killed(BaseException):
    """The process is gone: nothing that handles exceptions may act."""


class Engine:
    """Writes two files where DeepSpeed would write its shards; may die between them."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error

    def zero_optimization_stage(self) -> int:
        return 1

    def save_checkpoint(self, root: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        assert save_latest is False, "DeepSpeed would write it before the other ranks have finished"
        folder = Path(root, tag)
        (folder / "mp_rank_00_model_states.pt").write_bytes(b"m" * 1000)
        if self.error is not None:
            raise self.error
        (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"o" * 2000)


def save_at(
    root: Path, step: int, engine: Engine | None = None, **sections: dict[str, Any]
) -> tuple[Path, int]:
    config = small_config(**sections)
    stand_in: Any = engine or Engine()
    return save_checkpoint(root, step, STATE, config, stand_in, fake_groups())


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    folder, size = save_at(tmp_path / "new" / "root", 2)
    assert folder == tmp_path / "new/root/global_step2"
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "mp_rank_00_model_states.pt",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "rng_rank_00000.pt",
        layout.STATE_FILE,
        layout.CONFIG_FILE,
        layout.MANIFEST_FILE,
    }
    listed = layout.read_json(folder / layout.MANIFEST_FILE)["files"]
    assert set(listed) == files - {layout.MANIFEST_FILE} and size == sum(listed.values())
    state = layout.read_json(folder / layout.STATE_FILE)
    assert state == {**STATE, "layout": layout_of(small_config(), fake_groups())}
    assert isinstance(load_config(folder / layout.CONFIG_FILE), Config)
    streams = torch.load(folder / layout.rng_file(0), weights_only=True)
    assert torch.equal(streams["torch"], torch.get_rng_state())
    assert layout.latest_tag(folder.parent) == "global_step2"


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"parallel": {"zero_stage": 2}}, "zero_stage"),
        ({"train": {"precision": "bf16"}}, "precision"),
        ({"optim": {"weight_decay_on": "matrices"}}, "weight_decay_on"),
        ({"deepspeed": {"zero_optimization": {"round_robin_gradients": True}}}, None),
    ],
)
def test_the_layout_names_what_the_shards_depend_on(sections: dict[str, Any], field: str | None) -> None:
    groups = fake_groups(tp_size=2, dp_size=3)
    plain = layout_of(small_config(parallel={"tensor_model_parallel_size": 2}), groups)
    assert (plain["tensor_model_parallel_size"], plain["data_parallel_size"]) == (2, 3)
    other = layout_of(small_config(**sections), groups)
    assert {name for name in {**plain, **other} if plain.get(name) != other.get(name)} == {
        field or "deepspeed.zero_optimization.round_robin_gradients"
    }


def test_old_checkpoints_go_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save_at(tmp_path, step, checkpoint={"keep_last": 2})
    assert layout.finished_tags(tmp_path) == ["global_step6", "global_step8"]


KILLS: dict[str, Callable[[pytest.MonkeyPatch], Engine]] = {}
"""Name of the point at which the save of step 4 dies -> how."""


def kill_at(name: str, owner: Any, attribute: str, call: int = 1) -> None:
    """Die in the ``call``-th call of ``owner.attribute``."""

    def arm(monkeypatch: pytest.MonkeyPatch) -> Engine:
        original, calls = getattr(owner, attribute), []

        def dies(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == call:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, dies)
        return Engine()

    KILLS[name] = arm


KILLS["inside DeepSpeed's save"] = lambda monkeypatch: Engine(Killed())
kill_at("before the random streams", save.torch, "save")
kill_at("before the state", layout, "write_json")
kill_at("before the manifest", layout, "write_json", call=2)
kill_at("before the folder has its name", Path, "rename")
kill_at("before latest", layout, "replace_text")
kill_at("while latest is replaced", layout.os, "replace")
kill_at("before pruning", layout, "prune")
kill_at("in the first deletion", layout.shutil, "rmtree")
kill_at("in the second deletion", layout.shutil, "rmtree", call=2)
POINTS = [(point, again) for point in KILLS for again in (False, True)]
POINTS.remove(("in the second deletion", False))


@pytest.mark.parametrize(("point", "again"), POINTS)
def test_killed_at_any_point_a_whole_checkpoint_counts(
    point: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``again``: the save replaces an earlier one of the same step, which ``latest`` does not name."""
    save_at(tmp_path, 2)
    if again:
        save_at(tmp_path, 4)
        layout.replace_text(tmp_path / layout.LATEST_FILE, "global_step2")
    with monkeypatch.context() as patched:
        engine = KILLS[point](patched)
        with pytest.raises(Killed):
            save_at(tmp_path, 4, engine, checkpoint={"keep_last": 1})
    counts = layout.latest_tag(tmp_path)
    assert counts in ("global_step2", "global_step4")
    layout.verify_sizes(tmp_path / counts)
    save_at(tmp_path, 6, checkpoint={"keep_last": 1})
    assert layout.latest_tag(tmp_path) == "global_step6"
    layout.verify_sizes(tmp_path / "global_step6")
    assert not list(tmp_path.glob("*.tmp")), "what the killed save left is cleared"


def test_a_new_save_does_not_adopt_the_files_of_a_killed_one(tmp_path: Path) -> None:
    leftover = tmp_path / "global_step4.tmp"
    leftover.mkdir()
    (leftover / "zero_pp_rank_7_mp_rank_00_optim_states.pt").write_bytes(
        b"of a rank that this run does not have"
    )
    folder, _ = save_at(tmp_path, 4)
    assert not (folder / "zero_pp_rank_7_mp_rank_00_optim_states.pt").exists()


def test_a_write_that_fails_is_explained(tmp_path: Path) -> None:
    save_at(tmp_path, 2)
    full = Engine(OSError(28, "No space left on device"))
    with pytest.raises(CheckpointError, match=r"global_step4: No space left on device; earlier .* untouched"):
        save_at(tmp_path, 4, full)
    assert layout.latest_tag(tmp_path) == "global_step2" and not (tmp_path / "global_step4.tmp").exists()
    with pytest.raises(RuntimeError, match="a bug"):
        save_at(tmp_path, 4, Engine(RuntimeError("a bug")))
