"""Runs that keep an average of their weights: saved in the background, switched off and on, resharded, exported.

Bitwise resumes under every ZeRO stage are in test_resume.py, the rollback after a spike in
tests/engine/hooks/test_spike.py, the average itself in tests/engine/hooks/test_ema.py.
"""

from __future__ import annotations

import io
import shutil
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sgt.checkpoint.contents import read_contents
from megatron_sgt.checkpoint.describe import describe
from megatron_sgt.checkpoint.layout import read_json
from megatron_sgt.checkpoint.manifest import checksum_problems
from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.export.evaluate import evaluate, which_samples
from megatron_sgt.export.hf.open_model import open_model
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.planning.parameters import checkpoint_bytes
from megatron_sgt.planning.state_memory import average_bytes
from tests.helpers.commands import run_script
from tests.helpers.ranks import run_on_ranks
from tests.helpers.resharding import load_and_save
from tests.helpers.runs import (
    checkpoint_leaves,
    differing_leaves,
    measured_steps,
    pretrain,
    reported,
    tiny_config,
    write_tiny_data,
)

DECAY, MIDDLE, END = 0.75, 4, 8
ZERO_3 = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
SECTIONS: dict[str, dict[str, Any]] = {
    "parallel": {"zero_stage": 3},
    "deepspeed": ZERO_3,
    "train": {"train_iters": END, "eval_interval": MIDDLE, "precision": "bf16", "ema_decay": DECAY},
    "checkpoint": {"save_interval": MIDDLE, "keep_last": 0},
}
"""Two data-parallel ranks; the first layer is selected at step 3."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("averages")


@cache
def data(folder: Path) -> str:
    return write_tiny_data(folder)


def sections(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: {**SECTIONS.get(name, {}), **changes.get(name, {})} for name in {**SECTIONS, **changes}}


@cache
def whole(folder: Path) -> Path:
    """The uninterrupted run: its directory."""
    run_on_ranks(2, pretrain, tiny_config(folder / "whole", data(folder), **sections()))
    return folder / "whole"


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / f"checkpoints/global_step{step}"


def pretrain_and_tell(info: RankInfo, config: Any) -> list[str]:
    """What a run says about averages."""
    said = io.StringIO()
    with redirect_stdout(said):
        pretrain(info, config)
    return [line for line in said.getvalue().splitlines() if line.startswith("EMA")]


def test_saved_in_the_background_and_resumed_it_is_the_same(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint(whole(folder), MIDDLE), checkpoint(tmp_path, MIDDLE))
    config = tiny_config(tmp_path, data(folder), **sections(checkpoint={"async_save": True}))
    assert run_on_ranks(2, pretrain_and_tell, config) == [[], []]
    assert differing_leaves(checkpoint(whole(folder), END), checkpoint(tmp_path, END)) == []
    names = [name for name in checkpoint_leaves(checkpoint(tmp_path, END)) if "/average/" in name]
    assert names == [f"ema_000{rank}_mp_rank_00.pt/average/0" for rank in (0, 1)]
    files = [path.stat().st_size for path in checkpoint(tmp_path, END).glob("ema*")]
    planned = [average_bytes(config, 2, "bf16") for _ in files]
    off = config.model_copy(update={"train": config.train.model_copy(update={"ema_decay": 0.0})})
    assert sum(planned) == checkpoint_bytes(config, "bf16") - checkpoint_bytes(off, "bf16")
    # torch.save's own headers, whatever the size
    assert all(0 < size - share < 3000 for size, share in zip(files, planned, strict=True))
    assert reported(tmp_path, "valid") == [r for r in reported(whole(folder), "valid") if r["step"] == END]
    assert checksum_problems(checkpoint(tmp_path, END)) == []
    assert "an average of the weights, decay 0.75" in describe(read_contents(checkpoint(tmp_path, END), lambda _: []))


def test_switched_off_it_is_dropped_and_switched_on_it_starts_anew(folder: Path, tmp_path: Path) -> None:
    middle = MIDDLE + 1
    load = {"load": str(checkpoint(whole(folder), MIDDLE)), "save_interval": 1}
    off = sections(train={"ema_decay": 0.0, "exit_interval": middle}, checkpoint=load)
    assert run_on_ranks(2, pretrain_and_tell, tiny_config(tmp_path, data(folder), **off)) == [
        ["EMA  the checkpoint holds an average of the weights: it is dropped, as train.ema_decay is 0"], []
    ]  # fmt: skip
    assert not list(checkpoint(tmp_path, middle).glob("ema*"))
    assert "ema" not in read_json(checkpoint(tmp_path, middle) / "sgt_state.json")
    on = sections(train={"exit_interval": middle + 2}, checkpoint={"save_interval": 1})
    assert run_on_ranks(2, pretrain_and_tell, tiny_config(tmp_path, data(folder), **on)) == [
        ["EMA  the checkpoint holds no average of the weights: it starts from the checkpoint's weights"], []
    ]  # fmt: skip
    weights, averages = zip(*(shard(checkpoint(tmp_path, middle + n)) for n in range(3)), strict=True)
    expected = weights[0]
    for n in (1, 2):
        expected = torch.lerp(expected, weights[n], 1 - DECAY)
        assert torch.equal(averages[n], expected), "bit for bit what the saved weights give"
    # Neither changes the run; the average alone is another one than without the break.
    assert measured_steps(tmp_path) == [s for s in measured_steps(whole(folder)) if MIDDLE < s["step"] <= middle + 2]


def shard(folder: Path) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rank 1's fp32 weights and their average."""
    leaves = checkpoint_leaves(folder)
    [weights] = [tensor for name, tensor in leaves.items() if "rank_1_" in name and "fp32_flat_groups" in name]
    return weights.detach(), leaves.get("ema_0001_mp_rank_00.pt/average/0")


def test_it_survives_other_layouts_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    """From ZeRO 3 on two ranks to tensor parallel 2, and from there to one rank."""
    before, *_ = convert(checkpoint(whole(folder), END), tmp_path / "before")
    [expected] = before.glob("ema-*")
    source = checkpoint(whole(folder), END)
    shutil.copytree(source, tmp_path / source.name)
    source = tmp_path / source.name
    for tensor, dp_size, zero in ((2, 1, 1), (1, 1, 0)):
        name = f"{tensor}-{dp_size}-{zero}"
        changes = {
            "parallel": {"tensor_model_parallel_size": tensor, "zero_stage": zero},
            "train": {"precision": "fp32"},
        }
        config = tiny_config(
            tmp_path / name, data(folder), **{**sections(**changes), "deepspeed": ZERO_3 if zero else {}}
        )
        notes = run_on_ranks(tensor * dp_size, load_and_save, config, source, tmp_path / f"saved-{name}")
        assert f"zero_stage {3 if tensor == 2 else 1} -> {zero}" in notes[0]
        source = tmp_path / f"saved-{name}/global_step{END}"
        after, *_ = convert(source, tmp_path / f"after-{name}")
        assert (after / expected.name).read_bytes() == expected.read_bytes()
    weights = before / expected.name.replace("ema", "weights")
    assert weights.read_bytes() != expected.read_bytes()


def test_its_export_is_what_the_run_has_validated(folder: Path, tmp_path: Path) -> None:
    [record] = [record for record in reported(whole(folder), "valid") if record["step"] == END]
    assert abs(record["ema_loss"] - record["loss"]) > 1e-2
    arguments = ["--load", str(whole(folder) / "checkpoints"), "--dtype", "fp32", "--output"]
    done = run_script("tools/convert_to_hf.py", [*arguments, "averaged", "--weights", "ema"], tmp_path)
    assert done.code == 0 and "fp32 averaged weights" in done.out and "the same model" in done.out, done.out + done.err
    assert "moving average over the run's steps, decay 0.75" in (tmp_path / "averaged/README.md").read_text()
    opened = open_model(tmp_path / "averaged")
    wanted = which_samples(opened, (data(folder),), "90,10,0", "valid", None, 8)
    assert evaluate(opened, wanted, None, 4).loss == pytest.approx(record["ema_loss"], abs=0.02)  # of bf16 in the run
    free, *_ = convert(checkpoint(whole(folder), END), tmp_path / "free")
    [expected] = free.glob("ema-*")
    assert all(
        torch.equal(t, load_file(expected)[n]) for n, t in load_file(tmp_path / "averaged/model.safetensors").items()
    )


def test_without_one_the_export_of_it_is_refused(folder: Path, tmp_path: Path) -> None:
    off = {"train": {"train_iters": 3, "eval_interval": 0}}
    run_on_ranks(1, pretrain, tiny_config(tmp_path / "run", data(folder), **off))
    arguments = ["--load", "run/checkpoints", "--output", "hf", "--weights", "ema"]
    done = run_script("tools/convert_to_hf.py", arguments, tmp_path)
    assert (done.code, done.out) == (4, "")
    assert done.err == (
        "error: run/checkpoints/global_step3 holds no average of the weights: its run had train.ema_decay 0; "
        "export its weights (--weights trained)\n"
    )
    assert not list(tmp_path.glob("hf*"))
