"""Extensions of installed packages: found by name, imported when asked for, refused when they are not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sgt import extensions
from megatron_sgt.errors import ConfigError
from tests.architecture.source_tree import ROOT


def install(folder: Path, package: str, text: str, module: str = "LOADED = True\nclass Mine: ...\n") -> None:
    """A package with entry points, as pip would leave it in ``folder``."""
    (folder / f"{package}.py").write_text(module)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(text)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path for installed packages."""
    monkeypatch.syspath_prepend(tmp_path)
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        del sys.modules[name]


def test_an_entry_point_is_found_by_name_and_imported_late(site: Path) -> None:
    assert extensions.names("hooks") == []
    install(site, "theirs", "[megatron_sgt.hooks]\nmine = theirs:Mine\n")
    assert extensions.names("hooks") == ["mine"]
    assert extensions.names("schedules") == []
    assert "theirs" not in sys.modules
    assert extensions.load("hooks", "mine") is sys.modules["theirs"].Mine


def test_what_is_not_registered_is_refused_with_what_is(site: Path) -> None:
    install(site, "theirs", "[megatron_sgt.hooks]\nmine = theirs:Mine\n")
    with pytest.raises(ConfigError, match=r"'os.system' of megatron_sgt.hooks is not registered.* add mine"):
        extensions.load("hooks", "os.system")


def test_two_packages_cannot_claim_one_name(site: Path) -> None:
    install(site, "theirs", "[megatron_sgt.hooks]\nmine = theirs:Mine\n")
    install(site, "others", "[megatron_sgt.hooks]\nmine = others:Mine\n")
    with pytest.raises(ConfigError, match="claimed by others:Mine and theirs:Mine"):
        extensions.load("hooks", "mine")


@pytest.mark.parametrize(
    ("module", "reason"), [("import nowhere\n", "No module named 'nowhere'"), ("", "no attribute 'Mine'")]
)
def test_one_that_cannot_be_imported_says_why(site: Path, module: str, reason: str) -> None:
    install(site, "theirs", "[megatron_sgt.hooks]\nmine = theirs:Mine\n", module)
    with pytest.raises(ConfigError, match=rf"\(theirs:Mine\) cannot be imported: .*{reason}"):
        extensions.load("hooks", "mine")


def test_a_process_can_register_its_own() -> None:
    extensions.register("hooks", "mine", object)
    try:
        assert extensions.names("hooks") == ["mine"]
        assert extensions.load("hooks", "mine") is object
        with pytest.raises(ValueError, match="has 'mine' already"):
            extensions.register("hooks", "mine", object)
    finally:
        extensions.unregister("hooks", "mine")
    assert extensions.names("hooks") == []


def test_an_unknown_group_is_an_error() -> None:
    with pytest.raises(ValueError, match="group 'hook': choose one of schedules, hooks"):
        extensions.names("hook")


@pytest.mark.parametrize("path", extensions.GROUPS.values())
def test_every_group_says_where_its_objects_are_described(path: str) -> None:
    assert (ROOT / path).exists()
