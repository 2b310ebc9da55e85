"""Both folders of a run are held, whichever another run shares; what was deleted is written again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_sgt.engine.run_folders import RunFolders
from megatron_sgt.errors import LeaseError
from megatron_sgt.lease import inside
from tests.helpers.leases import held_by_another
from tests.helpers.runs import tiny_config


@pytest.mark.parametrize(
    ("shared", "setting"),
    [("a", "logging.run_dir"), ("a/checkpoints", "checkpoint.save"), ("elsewhere", "checkpoint.save")],
)
def test_a_run_that_shares_one_folder_is_refused(shared: str, setting: str, tmp_path: Path) -> None:
    save = None if shared.startswith("a") else str(tmp_path / shared)
    folders = RunFolders(tiny_config(tmp_path / "a", "data", checkpoint={"save": save}))
    with held_by_another(inside(tmp_path / shared)) as other, pytest.raises(LeaseError) as caught:
        folders.take()
    assert f"pid {other.pid}" in str(caught.value) and f"choose another {setting}" in str(caught.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [inside(tmp_path / shared)]


def test_folders_that_were_deleted_are_made_again_with_the_configuration(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folders = RunFolders(tiny_config(tmp_path / "a", "data"))
    folders.take()
    folders.check()
    assert not (tmp_path / "a/config.yaml").exists(), "nothing is written before the run is built"
    folders.write_config()
    text = (tmp_path / "a/config.yaml").read_text()
    shutil.rmtree(tmp_path / "a")
    folders.check()
    assert (tmp_path / "a/config.yaml").read_text() == text and inside(tmp_path / "a/checkpoints").exists()
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2 and all("deleted or moved away" in line for line in said)
    folders.release()
    assert "warning" in capfd.readouterr().err, "said again at the end"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["config.yaml"]
