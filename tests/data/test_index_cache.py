import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sgt.data.index_cache import (
    build_index_cache,
    megatron_datasets,
    open_split,
    wait_for_folder,
)
from megatron_sgt.data.splits import SplitPart, split_parts
from megatron_sgt.errors import DataError
from tests.helpers.datasets import write_dataset

LENGTHS = [5, 9, 3, 17, 30, 2, 8, 8, 8, 10]


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_dataset(tmp_path / "x_text_document", LENGTHS)


@pytest.fixture
def parts() -> tuple[SplitPart, ...]:
    return split_parts(np.array(LENGTHS, dtype=np.int32), (0.8, 0.2, 0.0), 8)


def build(prefix: str, parts: tuple[SplitPart, ...], root: Path, digest: str = "d", seed: int = 1) -> Path:
    return Path(build_index_cache(prefix, parts, digest, 8, seed, str(root)))


def test_one_folder_for_what_the_indices_depend_on(prefix: str, parts: tuple[SplitPart, ...], tmp_path: Path) -> None:
    root = tmp_path / "cache"
    folder = build(prefix, parts, root)
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert {file.name.split("-")[-1] for file in before} >= {"document_index.npy", "sample_index.npy"}
    assert build(prefix, parts, root) == folder
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before, "built once"
    assert build(prefix, parts, root, digest="other") != folder, "the corpus was rebuilt under the same name"
    assert build(prefix, parts, root, seed=2) != folder
    assert len(list(root.iterdir())) == 3, "nothing unfinished is left"


def test_every_token_of_a_split_is_in_its_epoch(prefix: str, parts: tuple[SplitPart, ...], tmp_path: Path) -> None:
    folder = str(build(prefix, parts, tmp_path / "cache"))
    for part in parts[:2]:
        dataset = open_split(prefix, part, 8, 1, folder)
        assert len(dataset) == part.samples
        seen = [int(token) for i in range(len(dataset)) for token in dataset[i]["tokens"]]
        first = sum(LENGTHS[: part.first])
        assert len(set(seen)) == len(seen) == part.samples * 8
        assert set(seen) <= set(range(first, first + part.tokens))


def test_validation_does_not_follow_the_seed(prefix: str, parts: tuple[SplitPart, ...], tmp_path: Path) -> None:
    orders = []
    for seed in (1, 2):
        folder = str(build(prefix, parts, tmp_path / "cache", seed=seed))
        orders.append([
            [open_split(prefix, part, 8, seed, folder)[i]["tokens"].tolist() for i in range(part.samples)]
            for part in parts[:2]
        ])  # fmt: skip
    assert orders[0][0] != orders[1][0]
    assert orders[0][1] == orders[1][1]


def test_a_killed_build_leaves_no_folder_of_that_name(
    prefix: str, parts: tuple[SplitPart, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megatron_sgt.data.index_cache.open_split", killed)
    with pytest.raises(KeyboardInterrupt):
        build(prefix, parts, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_unwritable_cache(prefix: str, parts: tuple[SplitPart, ...], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data_cache_path .*file/cache.*writable folder"):
        build(prefix, parts, tmp_path / "file" / "cache")


def test_cache_that_other_nodes_cannot_see(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be seen from .*all nodes share"):
        wait_for_folder(str(tmp_path / "none"), patience_seconds=0.3)


def test_index_builder_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    megatron_datasets()
    monkeypatch.setitem(sys.modules, "megatron.core.datasets.helpers_cpp", None)
    monkeypatch.delattr("megatron.core.datasets.helpers_cpp", raising=False)
    with pytest.raises(DataError, match=r"without its compiled index builder .*make -C .*megatron/core/datasets"):
        megatron_datasets()
