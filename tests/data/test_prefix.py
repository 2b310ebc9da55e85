from pathlib import Path

import pytest

from megatron_sgt.data.prefix import resolve_prefix
from megatron_sgt.errors import DataError
from tests.helpers.datasets import write_dataset


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "corpus_text_document", [3, 1, 4, 1, 5])


def test_accepts_the_names_that_people_use(prefix: str) -> None:
    assert resolve_prefix(prefix) == (prefix, None)
    for other in (prefix + ".bin", prefix + ".idx", prefix.removesuffix("_text_document")):
        found, note = resolve_prefix(other)
        assert found == prefix
        assert note is not None and other in note and prefix in note


def test_names_what_is_missing(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"looked for .*data sets in .*corpus_text_document"):
        resolve_prefix(str(tmp_path / "corpse"))
    with pytest.raises(DataError, match=r"folder .*nowhere does not exist"):
        resolve_prefix(str(tmp_path / "nowhere" / "x"))
    Path(prefix + ".idx").unlink()
    with pytest.raises(DataError, match=r"\.bin exists but .*\.idx does not"):
        resolve_prefix(prefix)
