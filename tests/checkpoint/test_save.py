"""A save counts when it is whole, and until then the one before it counts: killed at any point."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint import layout, manifest, save, shard_files
from megatron_sgt.checkpoint.restricted import load_restricted
from megatron_sgt.checkpoint.save import Saved, Saver, growth_fingerprint, layout_of
from megatron_sgt.config import Config, load_config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.files import replace_text
from megatron_sgt.planning.pipeline import pipeline_layout
from tests.helpers.checkpoints import ZERO_1
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config

STATE: dict[str, Any] = {"trainer": {"step": 2, "consumed_samples": 16}, "hooks": {}}


class Killed(BaseException):
    """The process is gone: nothing that handles exceptions may act."""


class Engine:
    """Hands two files to the checkpoint engine where DeepSpeed would; may die between them."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error
        self.checkpoint_engine: Any = None
        self.weights = torch.arange(1000.0)

    def zero_optimization_stage(self) -> int:
        return 1

    def save_checkpoint(self, root: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        assert save_latest is False, "DeepSpeed would write it before the other ranks have finished"
        folder = Path(root, tag)
        self.checkpoint_engine.save({"module": self.weights}, str(folder / "mp_rank_00_model_states.pt"))
        if self.error is not None:
            raise self.error
        optimizer = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        self.checkpoint_engine.save({"half": self.weights[500:]}, str(optimizer))


def saver_at(root: Path, engine: Engine | None = None, **sections: dict[str, Any]) -> Saver:
    checkpoint = {"save": str(root), **sections.pop("checkpoint", {})}
    stand_in: Any = engine or Engine()
    config = small_config(**{"deepspeed": ZERO_1, "checkpoint": checkpoint, **sections})
    return Saver(config, stand_in, fake_groups(), {"tokenizer": "t"})


def save_at(root: Path, step: int, engine: Engine | None = None, **sections: dict[str, Any]) -> Saved:
    saver = saver_at(root, engine, **sections)
    saver.start(step, STATE)
    saved = saver.poll(wait=True)
    assert saved is not None and not saver.in_flight
    return saved


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    saved = save_at(tmp_path / "new" / "root", 2)
    folder = saved.folder
    assert folder == tmp_path / "new/root/global_step2" and saved.step == 2
    files = {path.name for path in folder.iterdir()}
    where = layout_of(small_config(deepspeed=ZERO_1), fake_groups())
    assert files == {*layout.expected_files(where), layout.MANIFEST_FILE}
    about = manifest.read_manifest(folder)
    assert set(about["files"]) == files - {layout.MANIFEST_FILE}
    assert saved.num_bytes == sum(layout.file_sizes(folder).values())
    assert (about["tag"], about["step"], about["tokens"]) == ("global_step2", 2, 16 * 32)
    assert (about["layout"], about["tokenizer"]) == (where, "t")
    assert about["code"].startswith("megatron_sgt ") and len(about["config_sha256"]) == 64
    manifest.verify_checksums(folder)
    assert layout.read_json(folder / layout.STATE_FILE) == {**STATE, "layout": where}
    assert isinstance(load_config(folder / layout.CONFIG_FILE), Config)
    assert torch.equal(load_restricted(folder / layout.rng_file(0))["torch"], torch.get_rng_state())
    assert layout.latest_tag(folder.parent) == "global_step2"


def test_files_have_the_modes_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        folder = save_at(tmp_path / "root", 2).folder
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE((folder.parent / "latest").stat().st_mode) == 0o640


def test_an_asynchronous_save_writes_the_same_bytes_of_the_moment(tmp_path: Path) -> None:
    engine = Engine()
    now = save_at(tmp_path / "now", 2, engine).folder
    saver = saver_at(tmp_path / "later", engine, checkpoint={"async_save": True})
    for _ in range(2):  # the second copy goes into the memory of the first
        saver.start(2, STATE)
        engine.weights.zero_()
        later = saver.poll(wait=True)
        engine.weights.copy_(torch.arange(1000.0))
        assert later is not None and later.stall_s <= later.seconds
    shards = [name for name in layout.file_sizes(now) if name.endswith("_states.pt")]
    assert len(shards) == 2
    for name in shards:
        assert (now / name).read_bytes() == (later.folder / name).read_bytes(), name
    manifest.verify_checksums(later.folder)


def test_training_goes_on_between_the_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    original = torch.save
    monkeypatch.setattr(shard_files.torch, "save", lambda *args: (gate.wait(30), original(*args)))
    saver = saver_at(tmp_path, checkpoint={"async_save": True})
    saver.start(2, STATE)
    assert saver.poll() is None and saver.in_flight and layout.latest_tag(tmp_path) is None
    gate.set()
    while (saved := saver.poll()) is None:
        time.sleep(0.01)
    assert saved.step == 2 and layout.latest_tag(tmp_path) == "global_step2"
    assert saver.poll() is None


@pytest.mark.parametrize(
    ("sections", "fields"),
    [
        ({"parallel": {"zero_stage": 2}}, {"zero_stage"}),
        ({"train": {"precision": "bf16"}, "optim": {"grad_accum_dtype": "model"}}, {"precision"}),
        ({"train": {"precision": "bf16"}, "parallel": {"zero_stage": 2}}, {"precision", "zero_stage"}),
        ({"train": {"precision": "bf16"}}, {"precision", "optimizer"}),
        ({"optim": {"weight_decay_on": "matrices"}}, {"weight_decay_on"}),
        (
            {"deepspeed": {"zero_optimization": {"round_robin_gradients": True}}},
            {"deepspeed.zero_optimization.round_robin_gradients"},
        ),
    ],
)
def test_the_layout_names_what_the_shards_depend_on(sections: dict[str, Any], fields: set[str]) -> None:
    groups = fake_groups(tp_size=2, dp_size=3)
    plain = layout_of(small_config(parallel={"tensor_model_parallel_size": 2}), groups)
    assert (plain["tensor_model_parallel_size"], plain["data_parallel_size"]) == (2, 3)
    other = layout_of(small_config(**sections), groups)
    assert {name for name in {**plain, **other} if plain.get(name) != other.get(name)} == fields


def test_the_layout_of_a_pipeline_names_its_stages_and_their_layers() -> None:
    cut = {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "3,1"}
    config, groups = small_config(parallel=cut), fake_groups(pp_size=2)
    where = layout_of(config, groups)
    assert json.loads(json.dumps(where)) == where, "as a state says it"
    assert where == {
        **layout_of(small_config(), fake_groups()),
        "pipeline_model_parallel_size": 2,
        "pipeline_model_parallel_layout": [3, 1],
    }
    assert layout.pipeline_of(where, 4) == pipeline_layout(config)
    assert "pipeline" not in str(layout_of(small_config(), fake_groups()))


def test_old_checkpoints_go_and_the_newest_stay(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        save_at(tmp_path, step, checkpoint={"keep_last": 2, "keep_every": 0})
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
kill_at("in the first file", shard_files.torch, "save")
kill_at("in the last file", shard_files.torch, "save", call=3)
kill_at("before a file is on disk", os, "fsync")
kill_at("before the state", layout, "write_json")
kill_at("before the manifest", manifest, "write_manifest")
kill_at("in the manifest", layout, "write_json", call=2)
kill_at("before the folder is on disk", os, "fsync", call=8)
kill_at("before the folder has its name", os, "replace")
kill_at("before the new name is on disk", os, "fsync", call=9)
kill_at("before latest", layout, "point_to")
kill_at("while latest is replaced", os, "replace", call=2)
kill_at("before the other tracker", os, "replace", call=3)
kill_at("before pruning", layout, "prune")
kill_at("in a deletion", layout.shutil, "rmtree")
kill_at("in the second deletion", layout.shutil, "rmtree", call=2)
POINTS = [(point, again) for point in KILLS for again in (False, True)]


@pytest.mark.parametrize(("point", "again"), POINTS)
def test_killed_at_any_point_a_whole_checkpoint_counts(
    point: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``again``: the save replaces an earlier one of the same step, which ``latest`` does not name."""
    save_at(tmp_path, 2)
    if again:
        save_at(tmp_path, 4)
        replace_text(tmp_path / layout.LATEST_FILE, "global_step2")
    with monkeypatch.context() as patched:
        engine = KILLS[point](patched)
        with pytest.raises(Killed):
            save_at(tmp_path, 4, engine, checkpoint={"keep_last": 1})
    counts = layout.latest_tag(tmp_path)
    assert counts in ("global_step2", "global_step4")
    manifest.verify_checksums(tmp_path / counts)
    layout.clear_leftovers(tmp_path)  # as the next start does
    assert not list(tmp_path.glob("*.tmp")), "what the killed save left is cleared"
    save_at(tmp_path, 6, checkpoint={"keep_last": 1})
    assert layout.latest_tag(tmp_path) == "global_step6"
    manifest.verify_checksums(tmp_path / "global_step6")


def test_a_new_save_does_not_adopt_the_files_of_a_killed_one(tmp_path: Path) -> None:
    leftover = tmp_path / "global_step4.12345678.tmp"
    leftover.mkdir()
    (leftover / "zero_pp_rank_7_mp_rank_00_optim_states.pt").write_bytes(b"of a rank that this run does not have")
    assert not (save_at(tmp_path, 4).folder / "zero_pp_rank_7_mp_rank_00_optim_states.pt").exists()


@pytest.mark.parametrize("cleared", [False, True])
def test_two_saves_of_the_same_step_do_not_meet(cleared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped inside a save goes on when another has saved the same step, or is about to."""
    gate, original = threading.Event(), torch.save
    monkeypatch.setattr(shard_files.torch, "save", lambda *args: (gate.wait(30), original(*args)))
    former = saver_at(tmp_path, checkpoint={"async_save": True})
    former.start(4, STATE)
    monkeypatch.setattr(shard_files.torch, "save", original)
    if cleared:
        layout.clear_leftovers(tmp_path)  # as the other's start does
    other = saver_at(tmp_path)
    other.start(4, STATE)
    (ours,) = [path for path in tmp_path.glob("*.tmp") if layout.file_sizes(path)]
    before = {path.name: path.stat().st_mtime_ns for path in ours.iterdir()}
    gate.set()
    if cleared:
        with pytest.raises(CheckpointError, match="cannot write checkpoint"):
            former.poll(wait=True)
        assert list(tmp_path.glob("*.tmp")) == [ours]
    assert {path.name: path.stat().st_mtime_ns for path in ours.iterdir()} == before
    saved = other.poll(wait=True)
    assert saved is not None
    manifest.verify_checksums(saved.folder)


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("what", ["save", "sync"])
def test_a_write_that_fails_is_explained(
    what: str, async_save: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure is no error inside DeepSpeed, whose other ranks would wait there for ever."""
    save_at(tmp_path, 2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    saver = saver_at(tmp_path, checkpoint={"async_save": async_save})
    with monkeypatch.context() as patched:
        patched.setattr(shard_files.torch if what == "save" else shard_files, what, full)
        saver.start(4, STATE)
        with pytest.raises(CheckpointError, match=r"global_step4: No space left on device; earlier .* untouched"):
            saver.poll(wait=True)
    assert layout.latest_tag(tmp_path) == "global_step2" and not list(tmp_path.glob("*.tmp"))
    saver.start(6, STATE)
    assert saver.poll(wait=True) is not None, "the next save works again"


def test_a_bug_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        save_at(tmp_path, 4, Engine(RuntimeError("a bug")))


def test_a_file_that_is_missing_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = {"tensor_model_parallel_size": 2, "data_parallel_size": 1, "zero_stage": 1, "precision": "fp32"}
    monkeypatch.setattr(save, "layout_of", lambda *_: where)
    with pytest.raises(CheckpointError, match=r"files of this layout are missing: mp_rank_01_model_states\.pt"):
        save_at(tmp_path, 4)
    assert layout.finished_tags(tmp_path) == []


def test_what_grew_the_same_has_the_same_fingerprint() -> None:
    grown = {"hooks": {"growth": {"schedule": {"a": 1, "b": [0.5]}, "events": []}}}
    same = {"hooks": {"growth": {"events": [], "schedule": {"b": [0.5], "a": 1}}}}
    assert growth_fingerprint(grown) == growth_fingerprint(same) != growth_fingerprint({"hooks": {"growth": {}}})
    assert growth_fingerprint({"hooks": {}}) is None
