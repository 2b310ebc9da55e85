"""Files of a checkpoint in another's place, as DeepSpeed wrote them: found by a few pieces of them, or when loaded."""

from __future__ import annotations

import dataclasses
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.find import check_checkpoint
from megatron_sgt.checkpoint.identity import load_file
from megatron_sgt.checkpoint.load import load_checkpoint, verify_together
from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.checkpoint.reshard.sibling import layout_free_copy
from megatron_sgt.checkpoint.restricted import load_restricted
from megatron_sgt.checkpoint.save import Saver
from megatron_sgt.engine.hooks.replicas import verify_loaded
from megatron_sgt.engine.step import TrainState
from megatron_sgt.errors import CheckpointError, DamagedCheckpointError
from megatron_sgt.launch.rank_info import RankInfo
from tests.engine.test_step import Steps
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import small_config

STAGES = (0, 1, 2, 3)
WAYS = ("sync", "async")


def save(steps: Steps, root: Path, step: int, async_save: bool = False) -> None:
    checkpoint = steps.config.checkpoint.model_copy(update={"save": str(root), "async_save": async_save})
    saver = Saver(steps.config.model_copy(update={"checkpoint": checkpoint}), steps.engine, steps.groups)
    saver.start(step, {"trainer": TrainState(step, 2 * step).state_dict(), "hooks": {}})
    assert saver.poll(wait=True) is not None


def save_stages(info: RankInfo, root: Path) -> None:
    """A save of every ZeRO stage in both ways, over two data-parallel ranks."""
    for stage in STAGES:
        steps = Steps(info, 1, stage, clip=1.0)
        steps.take(0)
        for way in WAYS:
            save(steps, root / f"{way}{stage}", 1, way == "async")


def save_steps(info: RankInfo, root: Path) -> str:
    """Two steps at tensor parallel 2, the first in both ways, and what another run saved as step 1.

    Returns what is said when weights of the other run are loaded on one tensor-parallel rank.
    """
    steps = Steps(info, 2, 1, clip=1.0)
    for step in (1, 2):
        steps.take(step)
        save(steps, root / "run", step)
        save(steps, root / "later", step, async_save=True)
    for step in (3, 4):
        steps.take(step)
    save(steps, root / "other", 1)
    return load_mixed(steps, root)


def load_mixed(steps: Steps, root: Path) -> str:
    """Rank 1 of ``run`` with the files of ``other``, in a checkpoint that says that they belong there."""
    mixed = root / "mixed" / "global_step1"
    if steps.groups.is_main:
        shutil.copytree(root / "run/global_step1", mixed)
        for name in layout.files_of_rank({"zero_stage": 1}, 1, 0):
            shutil.copyfile(root / "other/global_step1" / name, mixed / name)
        about = {k: v for k, v in manifest.read_manifest(mixed).items() if k not in ("version", "files")}
        manifest.write_manifest(mixed, about)
    torch.distributed.barrier()
    saved = check_checkpoint(mixed, steps.config)
    whole = root / "run/global_step1"
    load_checkpoint(whole, check_checkpoint(whole, steps.config), steps.config, steps.engine, steps.groups)
    verify_loaded(steps.engine, whole, saved, steps.groups)
    load_checkpoint(mixed, saved, steps.config, steps.engine, steps.groups)
    try:
        verify_loaded(steps.engine, mixed, saved, steps.groups)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    root = tmp_path_factory.mktemp("saves")
    run_on_ranks(2, save_stages, root)
    return root, run_on_ranks(2, save_steps, root)


@pytest.fixture
def folder(saves: tuple[Path, list[str]], tmp_path: Path) -> Path:
    """A copy of the run's checkpoint of step 2, alone in its folder."""
    shutil.copytree(saves[0] / "run/global_step2", tmp_path / "own/global_step2")
    return tmp_path / "own/global_step2"


def problem(folder: Path) -> str:
    """What is seen without reading a file whole."""
    try:
        check_checkpoint(folder, small_config())
    except CheckpointError as error:
        return str(error)
    return verify_together(folder, small_config(checkpoint={"verify": "sizes"}), fake_groups()) or ""


def put(source: Path, target: Path) -> None:
    assert source.stat().st_size == target.stat().st_size and source.read_bytes() != target.read_bytes()
    shutil.copyfile(source, target)


KINDS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_rank_00000.pt")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("origin", ["another rank", "another step", "another run"])
def test_a_file_of_the_same_size_is_seen(name: str, origin: str, folder: Path, saves: tuple[Path, list[str]]) -> None:
    assert problem(folder) == ""
    if origin == "another rank":
        other = name.replace("mp_rank_00", "mp_rank_01").replace("00000", "00001")
        kept = (folder / other).read_bytes()
        put(folder / name, folder / other)
        (folder / name).write_bytes(kept)
    else:
        source = saves[0] / ("run" if origin == "another step" else "other") / "global_step1" / name
        if name.startswith("rng"):
            shutil.copyfile(source, folder / name)
        else:
            put(source, folder / name)
    assert f"{name} is not the file that was saved" in problem(folder)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("origin", ["another rank", "another step"])
def test_and_when_its_manifest_was_made_anew(
    name: str, origin: str, folder: Path, saves: tuple[Path, list[str]]
) -> None:
    other = name.replace("mp_rank_00", "mp_rank_01").replace("00000", "00001")
    source = folder / other if origin == "another rank" else saves[0] / "run/global_step1" / name
    shutil.copyfile(source, folder / name)
    about = {k: v for k, v in manifest.read_manifest(folder).items() if k not in ("version", "files")}
    manifest.write_manifest(folder, about)
    assert problem(folder) == ""
    said = f"file {other} instead of {name}" if origin == "another rank" else "step 1 instead of 2"
    with pytest.raises(DamagedCheckpointError, match=f"{name} is another file of a checkpoint: it says {said}"):
        load_file(folder / name)
    if not name.startswith("rng"):
        with pytest.raises(CheckpointError, match="is another file of a checkpoint"):
            convert(folder, folder.parent / "out")


def test_a_renamed_folder_is_seen(folder: Path) -> None:
    renamed = folder.rename(folder.with_name("global_step500"))
    layout.point_to(folder.parent, renamed.name)
    assert "was saved at step 2: the folder was renamed; give it back its name global_step2" in problem(renamed)


@pytest.mark.parametrize("origin", ["run/global_step1", "other/global_step1"])
def test_a_manifest_of_another_checkpoint_is_seen(
    origin: str, folder: Path, saves: tuple[Path, list[str]], tmp_path: Path
) -> None:
    shutil.copyfile(saves[0] / origin / layout.MANIFEST_FILE, folder / layout.MANIFEST_FILE)
    assert "was saved at step 1" in problem(folder)
    mine = tmp_path / "mine/global_step1"
    shutil.copytree(saves[0] / "run/global_step1", mine)
    shutil.copyfile(saves[0] / "other/global_step1" / layout.MANIFEST_FILE, mine / layout.MANIFEST_FILE)
    assert "mine/global_step1 is damaged" in problem(mine)


def test_a_run_keeps_its_name_and_every_file_its_rank(saves: tuple[Path, list[str]]) -> None:
    one, two, other = (
        manifest.read_manifest(saves[0] / place)
        for place in ("run/global_step1", "run/global_step2", "other/global_step1")
    )
    assert one["run"] == two["run"] != other["run"] and len(one["run"]) == 32
    ranks = {name: file.get("rank") for name, file in one["files"].items()}
    assert ranks["mp_rank_01_model_states.pt"] == ranks["rng_rank_00001.pt"] == 1
    assert ranks["zero_pp_rank_0_mp_rank_00_optim_states.pt"] == 0 and ranks[layout.STATE_FILE] is None


def test_a_copy_of_another_checkpoint_is_made_anew(folder: Path, saves: tuple[Path, list[str]]) -> None:
    groups = fake_groups()
    copy, _ = layout_free_copy(folder, groups)
    assert "read from" in layout_free_copy(folder, groups)[1]
    assert manifest.read_manifest(copy)["run"] == manifest.read_manifest(folder)["run"]
    shutil.rmtree(folder)
    shutil.copytree(saves[0] / "other/global_step1", folder.with_name("global_step1"))
    copy.rename(copy.with_name("global_step1.universal"))
    assert "converted into" in layout_free_copy(folder.with_name("global_step1"), groups)[1]


def test_weights_of_another_run_on_one_rank_are_named_after_loading(saves: tuple[Path, list[str]]) -> None:
    first, second = saves[1]
    assert first == second, "every rank raises the same"
    for part in (
        "rank 0, 1 from the others",
        "gpt.decoder.layers.0.input_layernorm.weight",
        "mp_rank_01_model_states.pt",
        "zero_pp_rank_0_mp_rank_01",
        "global_step1",
    ):
        assert part in first, first


@pytest.mark.parametrize("stage", STAGES)
def test_both_ways_write_the_same_bytes_and_no_script(stage: int, saves: tuple[Path, list[str]]) -> None:
    check_both(*(saves[0] / f"{way}{stage}" / "global_step1" for way in WAYS))


def test_where_one_rank_writes_all_weights_too(saves: tuple[Path, list[str]]) -> None:
    """With ``_metadata``, the versions of modules: an attribute of torch's state dicts."""
    now, later = (saves[0] / way / "global_step1" for way in ("run", "later"))
    check_both(now, later)
    for folder in (now, later):
        module: Any = load_restricted(folder / KINDS[0])["module"]
        assert module._metadata[""] == {"version": 1}


def check_both(now: Path, later: Path) -> None:
    names = {path.name for path in now.iterdir()}
    assert names == {path.name for path in later.iterdir()}
    where = layout.read_json(now / layout.STATE_FILE)["layout"]
    shares = {path.name for path in now.glob("weights_*.pt")}
    assert names == {*layout.expected_files(where), layout.MANIFEST_FILE} | shares
    for path in now.glob("*.pt"):
        assert path.read_bytes() == (later / path.name).read_bytes(), path.name


def test_an_old_manifest_says_nothing_of_samples(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = manifest.read_manifest(folder)
    files = {n: {"bytes": f["bytes"], "sha256": f["sha256"]} for n, f in content["files"].items()}
    about = {k: v for k, v in content.items() if k not in ("version", "files", "run")}
    manifest.write_manifest(folder, about, files)
    assert problem(folder) == ""
    (line,) = capsys.readouterr().out.splitlines()
    assert "an older version saved it" in line and "checkpoint.verify=checksums" in line
    check_checkpoint(folder, small_config())
    groups = dataclasses.replace(fake_groups())
    assert verify_together(folder, small_config(), groups) is None
    assert capsys.readouterr().out == ""


def test_the_end_of_a_file_holds_the_checksums_of_its_tensors(saves: tuple[Path, list[str]]) -> None:
    """What a sample rests on: other numbers in the same place change the last bytes of the file."""
    name = KINDS[0]
    records = [
        {entry.filename: entry.CRC for entry in zipfile.ZipFile(saves[0] / run / "global_step1" / name).infolist()}
        for run in ("run", "other")
    ]
    assert records[0].keys() == records[1].keys() and records[0] != records[1] and 0 not in records[0].values()
