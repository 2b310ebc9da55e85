from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError, ConfigError, DataError
from megatron_sgt.submit import preflight
from tests.helpers.checkpoints import write_plain_checkpoint
from tests.helpers.runs import TINY, tiny_config, write_tiny_data


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_tiny_data(tmp_path)


def config(tmp_path: Path, data: str, /, **sections: dict[str, Any]) -> Config:
    return tiny_config(tmp_path / "run", data, **sections)


def write_checkpoint(root: Path, step: int) -> Path:
    """A folder that counts as a checkpoint."""
    folder = write_plain_checkpoint(root / layout.tag_for(step), model=TINY["model"])
    layout.point_to(root, folder.name)
    return folder


def test_tells_the_shape_of_the_run(tmp_path: Path, data: str) -> None:
    rows = dict(preflight.preflight(config(tmp_path, data), 2, "cpu"))
    assert rows["layout"] == "2 ranks = tensor parallel 1 x data parallel 2 · ZeRO-1 · fp32"
    assert rows["batch"] == "8 = micro 2 x accumulation 2 x data parallel 2"
    assert rows["data"].startswith("120 documents")
    assert "free for checkpoints of" in rows["disk"] and "3 kept" in rows["disk"]
    assert rows["start"].startswith("FRESH START")
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize(
    ("sections", "error", "told"),
    [
        ({"train": {"global_batch_size": 6}}, ConfigError, "batch sizes do not multiply"),
        ({"logging": {"run_dir": f"{__file__}/run"}}, ConfigError, "logging.run_dir: cannot write"),
        ({"data": {"data_path": ["/nowhere/x"]}}, DataError, "/nowhere/x"),
        ({"data": {"data_path": []}}, DataError, "data_path is empty"),
        ({"checkpoint": {"load": "/nowhere"}}, CheckpointError, "no checkpoint at /nowhere"),
    ],
)
def test_refuses(
    tmp_path: Path, data: str, sections: dict[str, dict[str, Any]], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        preflight.preflight(config(tmp_path, data, **sections), 2, "cpu")


def test_files_are_looked_for_where_they_cannot_be_read(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    rows = dict(preflight.preflight(config(tmp_path, data), 2, "cpu"))
    assert rows["data"] == "1 data sets found, not read: no numpy here; the job reads them first"
    with pytest.raises(DataError, match="/nowhere/x"):
        preflight.preflight(config(tmp_path, data, data={"data_path": ["/nowhere/x"]}), 2, "cpu")
    tokenizer = {"tokenizer": {"type": "sentencepiece", "model": "/nowhere/t.model"}}
    with pytest.raises(DataError, match=r"no such file: /nowhere/t.model"):
        preflight.preflight(config(tmp_path, data, data=tokenizer), 2, "cpu")


def test_says_what_the_run_starts_from(tmp_path: Path, data: str) -> None:
    own, other = tmp_path / "run" / "checkpoints", tmp_path / "other"
    start = preflight.find_start
    assert start(config(tmp_path, data)) == f"FRESH START: no checkpoint in {own}"
    write_checkpoint(other, 3)
    load = {"checkpoint": {"load": str(other)}}
    assert start(config(tmp_path, data, **load)) == f"START at step 3 of 18 from {other}/global_step3"
    folder = write_checkpoint(own, 7)
    for sections in ({}, load):
        assert start(config(tmp_path, data, **sections)) == f"RESUME at step 7 of 18 from {folder}"
    with pytest.raises(CheckpointError, match=r"another model: model.hidden_size is 32 there and 64 here"):
        start(config(tmp_path, data, model={"hidden_size": 64}))
    by_tokenizer = config(tmp_path, data)
    model = by_tokenizer.model.model_copy(update={"vocab_size": None})
    assert start(by_tokenizer.model_copy(update={"model": model})).startswith("RESUME at step 7")
    older = write_checkpoint(own, 5)
    layout.point_to(own, folder.name)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"123")
    said = start(config(tmp_path, data))
    assert said.startswith(
        f"RESUME at step 5 of 18 from {older} (passed over: checkpoint {folder} is damaged"
    )
    (older / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"states.pt has 3 bytes instead of .*states.pt is missing"):
        start(config(tmp_path, data))
    write_checkpoint(own, 18)
    with pytest.raises(ConfigError, match=r"nothing to do: .*global_step18 is at step 18 of 18"):
        start(config(tmp_path, data))
