"""Which folders count as checkpoints, and that pruning and damage are handled on the safe side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.errors import CheckpointError
from megatron_sgt.files import replace_text


def make(root: Path, step: int, whole: bool = True) -> Path:
    """A committed checkpoint of two small files, or one whose save was cut short."""
    folder = root / layout.tag_for(step)
    (folder / "sub").mkdir(parents=True)
    (folder / "a.pt").write_bytes(b"x" * 100)
    (folder / "sub/b.pt").write_bytes(b"y" * 50)
    if whole:
        manifest.write_manifest(folder, {})
    return folder


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir() if path.is_dir()}


def test_names() -> None:
    assert (layout.tag_for(1000), layout.rng_file(12)) == ("global_step1000", "rng_rank_00012.pt")
    assert [layout.step_of(tag) for tag in ("global_step7", "global_step7.tmp", "other")] == [7, 0, 0]


def test_finished_tags_are_ordered_by_step_and_committed(tmp_path: Path) -> None:
    for step in (1000, 20, 300):
        make(tmp_path, step)
    make(tmp_path, 4000, whole=False)
    make(tmp_path, 5).rename(tmp_path / "global_step5.tmp")
    make(tmp_path, 6).rename(tmp_path / "global_step6.universal")
    (tmp_path / "global_step7").write_text("a file")
    assert layout.finished_tags(tmp_path) == ["global_step20", "global_step300", "global_step1000"]
    assert layout.finished_tags(tmp_path / "absent") == []


def test_latest_is_what_the_tracker_names(tmp_path: Path) -> None:
    assert layout.latest_tag(tmp_path) is None
    make(tmp_path, 2)
    make(tmp_path, 4)
    assert layout.latest_tag(tmp_path) == "global_step4", "without a tracker the newest"
    replace_text(tmp_path / layout.LATEST_FILE, "global_step2\n")
    assert layout.latest_tag(tmp_path) == "global_step2"


@pytest.mark.parametrize("text", ["global_step9", "", "global_step4.tmp", "../elsewhere"])
def test_a_tracker_that_points_nowhere_is_an_error(text: str, tmp_path: Path) -> None:
    make(tmp_path, 2)
    (tmp_path / layout.LATEST_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=r"not a whole checkpoint; there are: global_step2\. Write one"):
        layout.latest_tag(tmp_path)


def test_resolve_takes_a_root_or_one_checkpoint(tmp_path: Path) -> None:
    older, newer = make(tmp_path, 2), make(tmp_path, 4)
    assert layout.resolve(tmp_path) == newer
    assert layout.resolve(older) == older


def test_resolve_refuses_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder does not exist"):
        layout.resolve(tmp_path / "absent")
    unfinished = make(tmp_path / "runs", 3, whole=False)
    for place, seen in (
        (unfinished, "a.pt"),
        (tmp_path / "runs", "global_step3"),
        (unfinished / "a.pt", "a file"),
    ):
        with pytest.raises(CheckpointError, match=f"no whole checkpoint at .*seen there: {seen}"):
            layout.resolve(place)


def test_sizes_are_verified_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path, 2)
    manifest.verify_sizes(folder)
    (folder / "a.pt").write_bytes(b"x" * 50)
    (folder / "sub/b.pt").unlink()
    (folder / "more.pt").write_bytes(b"not of the save")
    with pytest.raises(CheckpointError, match=r"sub/b\.pt is missing; a\.pt has 50 bytes instead of 100") as caught:
        manifest.verify_sizes(folder)
    assert "more.pt" not in str(caught.value)


def test_json_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with pytest.raises(CheckpointError, match="cannot be read"):
        layout.read_json(path)
    path.write_text('{"a": ')
    with pytest.raises(CheckpointError, match="cannot be read"):
        layout.read_json(path)
    layout.write_json(path, {"a": [1, 2.5]})
    assert layout.read_json(path) == {"a": [1, 2.5]}


@pytest.mark.parametrize(
    ("sizes", "stage", "precision", "some", "count"),
    [
        ((2, 1, 1), 0, "fp32", "mp_rank_01_model_states.pt", 6),
        ((2, 2, 1), 1, "bf16", "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt", 12),
        ((1, 2, 1), 2, "fp32", "zero_pp_rank_1_mp_rank_00_optim_states.pt", 7),
        ((2, 2, 1), 3, "fp32", "zero_pp_rank_1_mp_rank_01_model_states.pt", 14),
        ((2, 2, 3), 1, "fp32", "zero_pp_rank_1_mp_rank_05_optim_states.pt", 2 + 6 + 12 + 12),
        ((1, 1, 4), 0, "fp32", "rng_rank_00003.pt", 2 + 4 + 4),
    ],
)
def test_what_a_layout_has(sizes: tuple[int, int, int], stage: int, precision: str, some: str, count: int) -> None:
    where: dict[str, Any] = {"tensor_model_parallel_size": sizes[0], "data_parallel_size": sizes[1]}
    if sizes[2] > 1:
        where |= {"pipeline_model_parallel_size": sizes[2], "pipeline_model_parallel_layout": [1] * sizes[2]}
    names = layout.expected_files({**where, "zero_stage": stage, "precision": precision})
    assert some in names and len(names) == count
    assert len(layout.expected_files(None)) == 2


def test_the_stages_of_a_layout() -> None:
    assert layout.pipeline_of({}, 5) == PipelineLayout(1, (5,)), "of a run without a pipeline, and of older versions"
    where = {layout.PIPELINE_SIZE: 2, layout.PIPELINE_COUNTS: [2, 1, 1, 1]}
    assert layout.pipeline_of(where, 5).layers(1) == (2, 4)
    with pytest.raises(ValueError, match="hold 5 layers, its model has 6"):
        layout.pipeline_of(where, 6)


def test_an_average_is_a_file_of_every_rank_that_has_its_own_part() -> None:
    where = {"tensor_model_parallel_size": 2, "data_parallel_size": 2, "precision": "bf16"}
    for stage, ours in (
        (0, {"0000_mp_rank_00", "0000_mp_rank_01"}),
        (3, {f"000{d}_mp_rank_0{t}" for d in (0, 1) for t in (0, 1)}),
    ):
        names = {**where, "zero_stage": stage}
        more = layout.expected_files(names, averaged=True) - layout.expected_files(names)
        assert more == {f"ema_{name}.pt" for name in ours}


def test_a_rank_reads_two_files_and_one_without_zero() -> None:
    where = {"zero_stage": 1, "precision": "fp32"}
    assert layout.files_of_rank(where, 1, 2) == (
        layout.model_file(1),
        "zero_pp_rank_2_mp_rank_01_optim_states.pt",
    )
    assert layout.files_of_rank({**where, "zero_stage": 0}, 1, 2) == (layout.model_file(1),)


def test_weights_of_zero_3_are_no_shared_ones() -> None:
    name = layout.model_file(1)
    assert name == "mp_rank_01_model_states.pt" and layout.is_model_file(name)
    for other in ("zero_pp_rank_0_mp_rank_01_model_states.pt", layout.part_file(name, 1), "rng_00000.pt"):
        assert not layout.is_model_file(other)


@pytest.mark.parametrize(("keep", "left"), [(0, {1, 2, 3, 4}), (1, {4}), (2, {3, 4}), (9, {1, 2, 3, 4})])
def test_prune_keeps_the_newest(keep: int, left: set[int], tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    layout.point_to(tmp_path, "global_step4")
    doomed = layout.prune(tmp_path, keep)
    assert names(tmp_path) == {layout.tag_for(step) for step in left}
    assert doomed == [layout.tag_for(step) for step in (1, 2, 3, 4) if step not in left]


def test_prune_keeps_milestones(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25):
        make(tmp_path, step)
    assert layout.prune(tmp_path, 1, keep_every=10) == ["global_step5", "global_step15"]
    assert names(tmp_path) == {"global_step10", "global_step20", "global_step25"}


def test_prune_keeps_the_ends_of_stages(tmp_path: Path) -> None:
    for step in (5, 7, 10, 15):
        make(tmp_path, step)
    layout.point_to(tmp_path, layout.tag_for(15))
    assert layout.prune(tmp_path, 1, ends={7, 99}) == ["global_step5", "global_step10"]


def test_prune_counts_from_what_latest_names(tmp_path: Path) -> None:
    """Later checkpoints are of a past that was given up: they must not push out what the run resumes from."""
    for step in (1, 2, 3, 8, 9):
        make(tmp_path, step)
    layout.point_to(tmp_path, "global_step3")
    assert layout.prune(tmp_path, 2) == ["global_step1"]
    assert names(tmp_path) == {f"global_step{step}" for step in (2, 3, 8, 9)}
    assert layout.candidates(tmp_path)[0] == [f"global_step{step}" for step in (3, 2, 9, 8)]


def test_what_is_tried_when_latest_names_nothing(tmp_path: Path) -> None:
    assert layout.candidates(tmp_path) == ([], None)
    for step in (2, 4):
        make(tmp_path, step)
    assert layout.candidates(tmp_path) == (["global_step4", "global_step2"], None)
    (tmp_path / layout.LATEST_FILE).write_text("")
    tags, note = layout.candidates(tmp_path)
    assert tags == ["global_step4", "global_step2"] and note is not None and "names ''" in note


def test_both_trackers_point_to_the_newest(tmp_path: Path) -> None:
    make(tmp_path, 12)
    layout.point_to(tmp_path, "global_step12")
    assert (tmp_path / "latest").read_text() == "global_step12"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "12\n"


def test_leftovers_of_dead_saves_are_cleared_and_the_rest_stays(tmp_path: Path) -> None:
    make(tmp_path, 1)
    make(tmp_path, 2, whole=False).rename(tmp_path / "global_step2.tmp")
    make(tmp_path, 3, whole=False)
    for name in ("latest.tmp", "latest.12345678.tmp", "latest_checkpointed_iteration.txt.12345678.tmp"):
        (tmp_path / name).write_text("glob")
    (tmp_path / "notes").mkdir()
    assert layout.clear_leftovers(tmp_path) == ["global_step2.tmp"]
    assert names(tmp_path) == {"global_step1", "global_step3", "notes"}
    assert not list(tmp_path.glob("*.tmp"))


def test_a_removal_cut_short_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, 1)
    calls = []

    def killed(*_: object, **__: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(layout.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            layout.remove(tmp_path / "global_step1")
    assert layout.finished_tags(tmp_path) == []
    layout.clear_leftovers(tmp_path)
    assert names(tmp_path) == set()


def test_data_that_is_skipped_comes_with_the_first_checkpoint_alone(tmp_path: Path) -> None:
    """A conversion into the folder of another run leaves to that run what it skips."""
    there, fresh, run = tmp_path / "there", tmp_path / "fresh", tmp_path / "run"
    for folder in (there, fresh, run):
        folder.mkdir()
    (there / layout.PASSED_FILE).write_text("[[0, 8]]")
    make(run, 5)
    for folder in (fresh, run):
        layout.carry_passed_data(there, folder)
    assert (fresh / layout.PASSED_FILE).read_text() == "[[0, 8]]"
    assert not (run / layout.PASSED_FILE).exists()
