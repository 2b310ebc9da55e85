"""A whole export: what lies in the folder, and that nothing lies there after an error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_sgt.checkpoint.reshard.rank_state import WEIGHTS
from megatron_sgt.config.data import TokenizerConfig
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.forms import STANDARD
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from megatron_sgt.lease import beside
from tests.helpers.checkpoints import grown_config, write_grown_checkpoint
from tests.helpers.commands import snapshot
from tests.helpers.deepspeed_files import random_state, write_manifest
from tests.helpers.leases import held_by_another

FP32 = ExportOptions(dtype="fp32")


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize(
    ("where", "pipeline"),
    [
        *((where, None) for where in [(1, 1, 0), (2, 2, 1), (4, 1, 2), (2, 3, 3)]),
        ((1, 1, 0), (2, (1, 3))),
        ((2, 2, 1), (2, (1, 1, 1, 1))),
    ],
)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_layout_gives_the_same_folder(
    tmp_path: Path, where: tuple[int, int, int], pipeline: tuple[int, tuple[int, ...]] | None, dtype: str
) -> None:
    write_grown_checkpoint(tmp_path / "ckpt", where, pipeline)
    before = snapshot(tmp_path / "ckpt")
    options = ExportOptions(dtype=dtype, max_shard_bytes=60_000)
    export = export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=options)
    expected = random_state(grown_config())[WEIGHTS]
    found = weights_in(export.folder)
    stored = torch.float32 if dtype == "fp32" else torch.bfloat16
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(stored)) for name in found)
    index = json.loads((export.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == export.weight_bytes
    config = json.loads((export.folder / "config.json").read_text())
    assert config["sgt_loops"] == {
        "1": {"heads": [1, 2], "depth": 1}, "3": {"heads": [0, 3], "depth": 2},
    }  # fmt: skip
    assert (export.architecture, export.drift) == ("SGTForCausalLM", 0.0)
    assert set(STANDARD.files) <= {path.name for path in export.folder.iterdir()}
    assert snapshot(tmp_path / "ckpt") == before
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "out"}


def test_the_gates_of_training_are_kept_when_asked_for(tmp_path: Path) -> None:
    write_grown_checkpoint(tmp_path / "ckpt")
    options = ExportOptions(training_gates=True, keep_padding=True)
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["sgt_loops"]["1"] == {"heads": [1, 2], "depth": 1, "other_gate": 0.5}
    assert "other_gate" not in config["sgt_loops"]["3"]


def remove_shard(folder: Path) -> None:
    (folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt").unlink()


def shorten_shard(folder: Path) -> None:
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-100])


def half_written(folder: Path) -> None:
    folder.rename(folder.with_name(folder.name + ".tmp"))
    (folder.parent / "latest").unlink()


def foreign(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"other")


def not_finite(folder: Path) -> None:
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(file, weights_only=True)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0][3000] = float("nan")
    torch.save(content, file)
    write_manifest(folder)


BREAKAGES: list[tuple[Callable[[Path], None], str]] = [
    (remove_shard, "zero_pp_rank_0_mp_rank_01_optim_states.pt is missing"),
    (shorten_shard, "zero_pp_rank_0_mp_rank_00_optim_states.pt has .* bytes instead of"),
    (half_written, "no whole checkpoint at"),
    (foreign, "no whole checkpoint at|is not a whole checkpoint"),
    (not_finite, "is not finite; export an earlier step"),
]


@pytest.mark.parametrize(("break_it", "words"), BREAKAGES, ids=lambda v: getattr(v, "__name__", ""))
def test_broken_checkpoints_leave_nothing_behind(tmp_path: Path, break_it: Callable[[Path], None], words: str) -> None:
    break_it(write_grown_checkpoint(tmp_path / "ckpt"))
    with pytest.raises(CheckpointError, match=words):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=FP32)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt"}


def test_a_wrong_tokenizer_leaves_nothing_behind(tmp_path: Path) -> None:
    write_grown_checkpoint(tmp_path / "ckpt")
    (tmp_path / "sp.model").write_bytes(b"no model")
    wanted = TokenizerConfig(type="sentencepiece", model=str(tmp_path / "sp.model"))
    with pytest.raises(CheckpointError, match=r"sp\.model is not a sentencepiece model"):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=ExportOptions(tokenizer=wanted))
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "sp.model"}


def test_nothing_that_exists_is_overwritten(tmp_path: Path) -> None:
    write_grown_checkpoint(tmp_path / "ckpt")
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="out exists already"):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=FP32)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"file/out.* cannot be"):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "file" / "out", options=FP32)


def test_two_exports_into_one_place_do_not_write_into_each_other(tmp_path: Path) -> None:
    write_grown_checkpoint(tmp_path / "ckpt")
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/of the other").touch()
    with (
        held_by_another(beside(tmp_path / "out")) as other,
        pytest.raises(CheckpointError, match=rf"pid {other.pid}\b.*--output"),
    ):
        export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=FP32)
    assert (tmp_path / "out.tmp/of the other").exists() and not (tmp_path / "out").exists()
    export_checkpoint(tmp_path / "ckpt", tmp_path / "out", options=FP32)
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "out"}
