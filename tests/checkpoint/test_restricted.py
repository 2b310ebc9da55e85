import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from megatron_sgt.checkpoint.restricted import load_restricted
from megatron_sgt.errors import CheckpointError, DamagedCheckpointError


class Executed:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


def test_classes_of_deepspeed_are_read(tmp_path: Path) -> None:
    scaler = DynamicLossScaler(512.0, 2.0, 1000, 1.0, 1)
    content = {
        "tensor": torch.arange(3.0), "scaler": scaler, "stage": ZeroStageEnum.weights,
        "address": fragment_address(3, 4), "shape": torch.Size([2, 3]),
    }  # fmt: skip
    torch.save(content, tmp_path / "file.pt")
    read = load_restricted(tmp_path / "file.pt")
    assert torch.equal(read["tensor"], content["tensor"])
    assert read["scaler"].cur_scale == 512.0
    assert [read[name] for name in ("stage", "address", "shape")] == [
        ZeroStageEnum.weights, fragment_address(3, 4), torch.Size([2, 3]),
    ]  # fmt: skip


def test_no_code_of_the_file_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"trap": Executed()}, "file.pt")
    with pytest.raises(CheckpointError, match="mkdir"):
        load_restricted(Path("file.pt"))
    assert not Path("executed").exists()


def test_missing_and_cut_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pt cannot be read"):
        load_restricted(tmp_path / "absent.pt")
    torch.save({"tensor": torch.zeros(1000)}, tmp_path / "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"file\.pt cannot be read"):
        load_restricted(tmp_path / "file.pt")


@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()])
def test_what_this_node_cannot_do_is_no_damage(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run passes over damaged checkpoints, and would lose the steps of a whole one."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    torch.save({}, tmp_path / "file.pt")
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(
        CheckpointError,
        match=r"file\.pt cannot be read: (Too many open files; raise the limit|this node is out of memory; start fewer)",
    ) as caught:
        load_restricted(tmp_path / "file.pt")
    assert not isinstance(caught.value, DamagedCheckpointError)
