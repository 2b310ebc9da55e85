import random
from pathlib import Path

import pytest
from soak_parts.disk import DAMAGES, damage, filled, small_disk


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_harms_one_file(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "global_step4"
    folder.mkdir()
    before = {name: bytes([number]) * 50 for number, name in enumerate("abc")}
    for name, content in before.items():
        (folder / name).write_bytes(content)
    assert damage(folder, kind, random.Random(1)) == "global_step4"
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    (harmed,) = [name for name in before if before[name] != after.get(name)]
    if kind == "deleted file":
        assert harmed not in after
    elif kind == "truncated file":
        assert before[harmed].startswith(after[harmed])
    else:
        pairs = zip(before[harmed], after[harmed], strict=True)
        assert sum((one ^ other).bit_count() for one, other in pairs) == 1


def test_a_disk_that_can_be_filled(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as mounted:
        if not mounted:
            pytest.skip("this user may not mount a tmpfs")
        file = tmp_path / "disk" / "file"
        with filled(tmp_path / "disk", room=1 << 18), pytest.raises(OSError, match="No space left"):
            file.write_bytes(bytes(1 << 19))
        file.write_bytes(bytes(1 << 19))
    assert list((tmp_path / "disk").iterdir()) == []
