import os
from pathlib import Path

from megatron_sgt.data.folders import Folders


def test_own_names_come_before_links(tmp_path: Path) -> None:
    """The order is that of the names; a file is met under its own name, though a link to its folder sorts before."""
    for name in ("z/b.txt", "z/a.txt", "y.txt", "z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    os.symlink("z", tmp_path / "link")
    folders = Folders()
    found = folders.search(tmp_path)
    assert [str(file.path.relative_to(tmp_path)) for file in found] == ["y.txt", "z/a.txt", "z/b.txt", "z.txt"]
    assert not any(file.linked for file in found)
    assert folders.repeated == [(tmp_path / "link", tmp_path / "z")]


def test_identities(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    os.link(tmp_path / "a", tmp_path / "hard")
    os.symlink("b", tmp_path / "soft")
    found = {file.path.name: file for file in Folders().search(tmp_path)}
    assert found["a"].identity == found["hard"].identity != found["b"].identity == found["soft"].identity
    assert found["soft"].linked and found["soft"].target == str(tmp_path.resolve() / "b")
