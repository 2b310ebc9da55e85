"""Files of a checkpoint that were cut, edited or exchanged for something else: the newest whole checkpoint is taken and
one line says why a newer one was not; a checkpoint that the user has named is refused with exit code 4."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sgt import preflight
from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.contents import read_contents
from megatron_sgt.config import Config
from megatron_sgt.engine.skipped_ranges import PASSED_FILE, SkippedRanges
from megatron_sgt.errors import CheckpointError, SGTError
from megatron_sgt.growth.methods import build_schedule
from tests.helpers.checkpoints import grown_config
from tests.helpers.forging import (
    DEEP,
    EDITS,
    LATEST,
    NEWER,
    OLDER,
    VALUES,
    as_folder,
    places,
    signed_again,
    with_value,
    write_signed,
)

STATE, CONFIG, MANIFEST = layout.STATE_FILE, layout.CONFIG_FILE, layout.MANIFEST_FILE


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def config_at(root: Path, **checkpoint: Any) -> Config:
    config = grown_config()
    section = {"save": str(root), **checkpoint}
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=section)})


def passed_over(root: Path) -> str:
    """The one line that says why the newer checkpoint is not taken; "" where it is."""
    start = preflight.find_start(config_at(root))
    if start.folder == root / NEWER:
        return ""
    assert start.folder == root / OLDER
    (line,) = start.skipped
    assert "\n" not in line and NEWER in line and len(line) < 1500, line
    return line


@pytest.mark.parametrize("name", [MANIFEST, STATE, CONFIG])
def test_a_newer_checkpoint_with_a_damaged_file_is_passed_over(name: str, root: Path, tmp_path: Path) -> None:
    """As it is, and with a manifest that was made anew to fit the file; named by the user it is refused."""
    whole = (root / NEWER / name).read_bytes()
    manifest = (root / NEWER / MANIFEST).read_bytes()
    for (what, edit), again in itertools.product(EDITS.items(), (False, True)):
        edit(root / NEWER / name)
        if again and name != MANIFEST and (root / NEWER / name).is_file():
            signed_again(root / NEWER, name)
        assert passed_over(root), (what, again)
        with pytest.raises(CheckpointError) as caught:
            preflight.find_start(config_at(tmp_path / "own", load=str(root / NEWER)))
        assert caught.value.exit_code == 4 and "\n" not in str(caught.value), (what, str(caught.value))
        path = root / NEWER / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(whole)
        (root / NEWER / MANIFEST).write_bytes(manifest)
    assert not passed_over(root) and not Path("executed").exists()


def test_without_a_whole_one_the_run_does_not_begin_at_step_0(root: Path) -> None:
    for tag in (OLDER, NEWER):
        (root / tag / STATE).write_text("[]")
        signed_again(root / tag, STATE)
    with pytest.raises(CheckpointError, match=f"{NEWER}.*it is a list, not an object.*{OLDER}.*from scratch") as caught:
        preflight.find_start(config_at(root))
    assert "\n" not in str(caught.value)


HARMLESS = re.compile(
    r"hooks/growth/events(/.*)?|hooks/growth/schedule/ema/0/0|tag|tokenizer|run|code|tokens"
    r"|hooks/growth/schedule/config/(entropy_after_fixed|ramp)"
)
"""Places where another value is as good, or is the same: nothing that a run does depends on them."""


def forged(content: Any, each: int = 2) -> Iterator[tuple[tuple[Any, ...], str, Any]]:
    """Every place with a few of VALUES, in turns, so that every value comes to every kind of place."""
    names = itertools.cycle(VALUES)
    for place in places(content):
        for name in itertools.islice(names, each):
            yield place, name, with_value(content, place, VALUES[name])


@pytest.mark.parametrize("name", [STATE, MANIFEST])
def test_every_key_may_hold_anything(name: str, root: Path) -> None:
    """With checksums that fit: the state is passed over, or a run can continue from it."""
    path = root / NEWER / name
    whole = json.loads(path.read_text())
    whole.pop("sha256", None)
    config, taken = grown_config(), []
    for place, value, content in forged(whole):
        if name == MANIFEST:
            write_signed(root / NEWER, content)
        else:
            layout.write_json(path, content)
            signed_again(root / NEWER, name)
        if not passed_over(root) and content != whole:
            where = "/".join(map(str, place))
            state = layout.read_json(root / NEWER / STATE)["hooks"]["growth"]["schedule"]
            build_schedule(config.growth, config.model.num_layers, config.model.num_attention_heads).load_state_dict(
                state
            )
            taken.append((where, value))
    same = {
        ("hooks/growth/schedule/config/exact_ema", "true"),
        ("hooks/growth/schedule/config/block_loop_count", "true"),
        ("hooks/growth/schedule/grown/0/chosen_at", "negative"),  # as of loops that an imported model had
    }
    unexpected = [found for found in taken if not HARMLESS.fullmatch(found[0]) and found not in same]
    assert not unexpected, unexpected


def test_every_key_of_the_configuration_may_hold_anything(root: Path) -> None:
    """It is passed over, or says a setting that may change, or that the model is another."""
    path = root / NEWER / CONFIG
    whole = yaml.safe_load(path.read_text())
    for place, value, content in itertools.islice(forged(whole, 1), 0, None, 2):
        path.write_text(yaml.safe_dump(content))
        signed_again(root / NEWER, CONFIG)
        try:
            passed_over(root)
        except CheckpointError as error:
            assert "belongs to another model" in str(error) or "does not fit" in str(error), (place, value, error)


PLANS: dict[str, Callable[[dict[str, Any]], None]] = {
    "a head that the model lacks": lambda s: s["grown"][0].update(kept_heads=[0, 4]),
    "a negative head": lambda s: s["grown"][0].update(kept_heads=[-1, 2]),
    "heads out of order": lambda s: s["grown"][0].update(kept_heads=[3, 0]),
    "no head": lambda s: s["grown"][0].update(kept_heads=[]),
    "a layer twice": lambda s: s["grown"][1].update(layer=3),
    "a layer that the model lacks": lambda s: s["grown"][1].update(layer=4),
    "a layer too deep": lambda s: s["grown"][0].update(loops=3),
    "no loop": lambda s: s["grown"][0].update(loops=0),
    "chosen in the future": lambda s: s["grown"][0].update(chosen_at=1000),
    "a window without end": lambda s: s.update(window_end=10**9),
    "another phase": lambda s: s.update(phase="vanilla"),
    "nothing grown": lambda s: s.update(grown=[]),
    "a later step": lambda s: s.update(step=1000),
    "entropies of another model": lambda s: s.update(ema=[[0.5] * 4] * 5),
    "an entropy that is no number": lambda s: s["ema"][0].__setitem__(0, float("nan")),
}


@pytest.mark.parametrize("what", PLANS)
def test_a_plan_that_the_model_cannot_execute_is_passed_over(what: str, root: Path) -> None:
    state = layout.read_json(root / NEWER / STATE)
    PLANS[what](state["hooks"]["growth"]["schedule"])
    layout.write_json(root / NEWER / STATE, state)
    signed_again(root / NEWER, STATE)
    assert "growth state is" in passed_over(root)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../../etc/passwd", "no name of a file inside"),
        ("/etc/passwd", "no name of a file inside"),
        ("a\x00b", "no name of a file inside"),
        ("\ud800", "no name of a file inside"),
        ("absent.pt", r"absent\.pt is missing"),
    ],
)
def test_a_manifest_names_only_files_of_its_folder(name: str, said: str, root: Path) -> None:
    content = layout.read_json(root / NEWER / MANIFEST)
    del content["sha256"]
    content["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    write_signed(root / NEWER, content)
    assert re.search(said, passed_over(root))


def test_sizes_and_layouts_that_nothing_can_have(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = layout.read_json(root / NEWER / MANIFEST)
    del content["sha256"]
    file = content["files"][layout.model_file(0)]
    claims = {**content, "files": {**content["files"], layout.model_file(0): {**file, "bytes": 10**9}}}
    write_signed(root / NEWER, claims)
    assert "instead of 1000000000" in passed_over(root)
    write_signed(root / NEWER, {**content, "layout": {**content["layout"], "data_parallel_size": 1 << 23}})
    assert "for the ranks of its layout" in passed_over(root)
    write_signed(root / NEWER, content)
    assert not passed_over(root)
    size = (root / NEWER / MANIFEST).stat().st_size
    (root / NEWER / MANIFEST).write_text(f"{(root / NEWER / MANIFEST).read_text()}{' ' * size}")
    monkeypatch.setattr(layout, "_LARGEST_JSON", size + 10)
    assert "bytes" in passed_over(root)


@pytest.mark.parametrize("what", LATEST)
def test_whatever_latest_holds_the_newest_is_found(what: str, root: Path) -> None:
    LATEST[what](root / "latest")
    start = preflight.find_start(config_at(root))
    (line,) = start.skipped
    assert start.folder == root / NEWER and "latest" in line and "\n" not in line and len(line) < 500


def test_what_may_not_be_read_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of another user. (Permissions do not hold for root, as whom tests may run.)"""
    is_file, stat = Path.is_file, Path.stat

    def denied(path: Path) -> None:
        if path.parent == root / NEWER:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", lambda path: denied(path) or is_file(path))
    monkeypatch.setattr(Path, "stat", lambda path, **options: denied(path) or stat(path, **options))
    assert "denied" in passed_over(root)


PASSED = [
    "", "[]", "{}", "null", '{"ranges": null}', '{"ranges": [[1]]}', '{"ranges": [[5, 1]]}', '{"ranges": [[-3, 1]]}',
    '{"ranges": [["0", "9"]]}', '{"ranges": [[0, 1e999]]}', '{"ranges": [[NaN, 3]]}', '{"ranges": 3}', DEEP,
    '{"ranges": [[0, ' + "9" * 5000 + "]]}", '{"ranges": [], "ranges": []}', '{"ranges": [[0, true]]}',
]  # fmt: skip


def test_damaged_ranges_of_passed_data_are_refused(tmp_path: Path) -> None:
    for text in PASSED:
        (tmp_path / PASSED_FILE).write_text(text)
        with pytest.raises(
            CheckpointError, match=f"{PASSED_FILE} is damaged.*delete it to train on all data"
        ) as caught:
            SkippedRanges.read(tmp_path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    as_folder(tmp_path / PASSED_FILE)
    with pytest.raises(CheckpointError, match="is damaged"):
        SkippedRanges.read(tmp_path)


def test_a_folder_with_another_step_in_its_name_is_found(root: Path) -> None:
    """A copy or a link: what is in it is of another step."""
    shutil.rmtree(root / NEWER)
    os.symlink(root / OLDER, root / NEWER)
    assert f"was saved at step 7: the folder was renamed; give it back its name {OLDER}" in passed_over(root)
    (contents,) = [read_contents(root / NEWER, lambda folder: [str(e) for e in errors_of(folder)])]
    assert contents.status == "damaged"
    named = root.parent / "a_name_of_mine"
    shutil.copytree(root / OLDER, named)
    found = preflight.find_start(config_at(root.parent / "own", load=str(named)))
    assert found.folder == named, "a name that says no step is free"


def errors_of(folder: Path) -> Iterator[SGTError]:
    try:
        layout_problems = preflight.check_checkpoint(folder, grown_config())
        assert layout_problems
    except SGTError as error:
        yield error
