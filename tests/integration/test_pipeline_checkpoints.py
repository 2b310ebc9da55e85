"""Checkpoints of runs with a pipeline: resumed bit for bit, and under every other layout within rounding."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint.layout import read_json
from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, QUANTITIES
from megatron_sgt.checkpoint.reshard.source import open_source
from tests.helpers.commands import run_process
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import SHARED_MEMORY, run_on_ranks
from tests.helpers.resharding import (
    AFTER,
    BASE,
    BF16_TOLERANCE,
    EVERYWHERE,
    INSIDE,
    STEPS,
    TOLERANCE,
    load_and_save,
    merged,
)
from tests.helpers.runs import differing_leaves, measured_steps, pretrain, reported, tiny_config, write_tiny_data
from tests.helpers.staged import FIRST, LAST, SECOND, grow_records, staged_config

AVERAGED = merged(BASE, {"train": {"ema_decay": 0.75}})
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    **EVERYWHERE,
    "tied": {
        "model": {
            "num_query_groups": 2, "qk_layernorm": True, "qk_layernorm_over": "all", "norm_position": "output",
            "untie_embeddings_and_output_weights": False,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Where:
    """A layout; ``cut``: layers of every chunk of its pipeline."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 1
    cut: str = "auto"
    virtual: int = 1

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def backend(self) -> str:
        """Stages send to each other, which the shared memory of the tests does not."""
        return "gloo" if self.pp > 1 else SHARED_MEMORY

    def parallel(self) -> dict[str, Any]:
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "pipeline_model_parallel_layout": self.cut,
            "virtual_pipeline_model_parallel_size": self.virtual,
            "zero_stage": self.zero,
        }

    def __str__(self) -> str:
        cut = "" if self.pp == 1 else f"-PP{self.pp}xVP{self.virtual}({self.cut})"
        return f"TP{self.tp}{cut}-DP{self.dp}-Z{self.zero}"


ALONE = Where(zero=0)
PP2, PP4 = Where(pp=2), Where(pp=4)
UNEVEN = Where(pp=2, cut="3,1")
INTERLEAVED = Where(pp=2, virtual=2)

Pair = tuple[Where, Where, int, str]
PAIRS: list[Pair] = [
    (PP2, ALONE, INSIDE, "plain"),
    (ALONE, Where(pp=4, tp=2), AFTER, "plain"),
    (Where(pp=4, tp=2), PP2, INSIDE, "plain"),
    (Where(pp=4, tp=2), ALONE, AFTER, "plain"),
    (UNEVEN, Where(pp=2, zero=0), INSIDE, "plain"),
    (PP4, Where(pp=2, cut="1,3", zero=2), AFTER, "plain"),
    (INTERLEAVED, PP2, INSIDE, "plain"),
    (UNEVEN, INTERLEAVED, AFTER, "plain"),
    (INTERLEAVED, Where(dp=2, zero=3), AFTER, "plain"),
    (Where(pp=2, dp=2, zero=2), Where(dp=2, zero=3), INSIDE, "plain"),
    (Where(dp=2, zero=3), Where(pp=2, dp=2), INSIDE, "plain"),
    (Where(dp=2, zero=3), Where(pp=2, dp=3, zero=2), AFTER, "plain"),
    (Where(pp=2, dp=2, zero=2), Where(pp=2, dp=3), AFTER, "plain"),
    (Where(pp=2, tp=2), Where(tp=2, dp=2), INSIDE, "plain"),
    (Where(tp=2, zero=0), Where(pp=2, tp=2, zero=0), AFTER, "plain"),
    (PP2, Where(dp=3), INSIDE, "two_groups"),
    (PP2, ALONE, INSIDE, "tied"),
    (ALONE, Where(pp=2, zero=2), AFTER, "tied"),
    (Where(pp=2, dp=2), Where(pp=2, dp=2, zero=2), INSIDE, "dropout"),
    (PP2, Where(dp=2, zero=3), INSIDE, "bf16"),
]
SHARE: list[Pair] = [(PP2, ALONE, INSIDE, "tied")]
"""What `make test` takes: out of a pipeline. Into one: test_the_whole_state_survives_bit_for_bit."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data and every run."""
    return tmp_path_factory.mktemp("pipelines")


@cache
def data(folder: Path) -> str:
    return write_tiny_data(folder)


def run(
    run_dir: Path, folder: Path, where: Where, variant: str, stop: int | None = None, **checkpoint: Any
) -> dict[int, dict[str, Any]]:
    """Train in new processes up to step ``stop``; returns what every step measured."""
    ours = {"parallel": where.parallel(), "train": {"exit_interval": stop}, "checkpoint": checkpoint}
    sections = merged(merged(AVERAGED, VARIANTS[variant]), ours)
    run_on_ranks(where.ranks, pretrain, tiny_config(run_dir, data(folder), **sections), backend=where.backend)
    return {record["step"]: record for record in measured_steps(run_dir)}


@cache
def source(folder: Path, where: Where, variant: str, stop: int) -> tuple[Path, dict[int, dict[str, Any]]]:
    """An uninterrupted run up to step ``stop``: its folder of checkpoints, and what it measured."""
    run_dir = folder / f"{variant}-{where}-{stop}"
    return run_dir / "checkpoints", run(run_dir, folder, where, variant, stop)


@pytest.mark.parametrize(("there", "here", "saved_at", "variant"), share_of(PAIRS, SHARE), ids=str)
def test_losses_continue(there: Where, here: Where, saved_at: int, variant: str, folder: Path, tmp_path: Path) -> None:
    root, expected = source(folder, there, variant, saved_at + STEPS)
    load = str(root / f"global_step{saved_at}")
    found = run(tmp_path, folder, here, variant, load=load, save_interval=0, stop=saved_at + STEPS)
    assert list(found) == list(range(saved_at + 1, saved_at + STEPS + 1))
    for step, record in found.items():
        for name in ("lr", "consumed_samples", "loop_depth", "other_gates", "phase"):
            assert record[name] == expected[step][name], (step, name)
    differences = [abs(record["loss"] - expected[step]["loss"]) for step, record in found.items()]
    norms = [abs(record["grad_norm"] / expected[step]["grad_norm"] - 1) for step, record in found.items()]
    print(f"{variant} {there} -> {here} at {saved_at}: loss {max(differences):.1e}, norm {max(norms):.1e}")
    assert max(differences) <= (BF16_TOLERANCE if variant == "bf16" else TOLERANCE)
    events = [[r for r in reported(place, "growth") if r["step"] > saved_at] for place in (tmp_path, root.parent)]
    told = [[(r["step"], r["kept_heads"]) for r in some if r["step"] <= saved_at + STEPS] for some in events]
    assert told[0] == told[1]


STATES = [PP2, UNEVEN, INTERLEAVED, Where(pp=2, tp=2), Where(pp=2, dp=2, zero=2), Where(pp=4, zero=0)]


@pytest.mark.parametrize("here", share_of(STATES, [UNEVEN]), ids=str)
def test_the_whole_state_survives_bit_for_bit(here: Where, folder: Path, tmp_path: Path) -> None:
    """Weights, moments, average and step, from the files of one rank through those of a pipeline."""
    root, _ = source(folder, ALONE, "tied", INSIDE)
    checkpoint = root / f"global_step{INSIDE}"
    sections = merged(merged(AVERAGED, VARIANTS["tied"]), {"parallel": here.parallel()})
    config = tiny_config(tmp_path / "run", data(folder), **sections)
    notes = run_on_ranks(here.ranks, load_and_save, config, checkpoint, tmp_path / "saved", backend=here.backend)
    assert f"pipeline_model_parallel_size 1 -> {here.pp}" in notes[0]
    before, *_ = convert(checkpoint, tmp_path / "before")
    after, _, drift = convert(tmp_path / f"saved/global_step{INSIDE}", tmp_path / "after")
    assert drift == 0.0
    for quantity in (*QUANTITIES, AVERAGE):
        name = f"{quantity}-00001-of-00001.safetensors"
        assert (before / name).read_bytes() == (after / name).read_bytes()
    states = [read_json(place / "sgt_state.json") for place in (before, after)]
    assert states[0]["layout_free"]["optimizer_step"] == states[1]["layout_free"]["optimizer_step"] == INSIDE
    assert states[0]["hooks"] == states[1]["hooks"]


RESUMES: list[tuple[Where, str]] = [
    (PP2, "dropout"),
    (Where(pp=2, zero=0), "tied"),
    (Where(pp=2, tp=2), "plain"),
    (Where(pp=2, dp=2), "dropout"),
    (Where(pp=2, dp=2, zero=2), "tied"),
    (INTERLEAVED, "dropout"),
    (INTERLEAVED, "tied"),
    (Where(pp=4, cut="1,1,1,1"), "two_groups"),
    (PP2, "bf16"),
    (Where(pp=2, dp=2, zero=2), "bf16"),
]


@pytest.mark.parametrize(("where", "variant"), share_of(RESUMES, [(PP2, "dropout")]), ids=str)
def test_a_resumed_run_is_the_uninterrupted_run(where: Where, variant: str, folder: Path, tmp_path: Path) -> None:
    """Stopped inside a window; every file of every rank is equal at the end: moments, average, random streams."""
    end = INSIDE + 4
    whole = run(tmp_path / "whole", folder, where, variant, save_interval=0, stop=end)
    run(tmp_path / "parts", folder, where, variant, save_interval=0, stop=INSIDE)
    assert run(tmp_path / "parts", folder, where, variant, save_interval=0, stop=end) == whole
    last = [tmp_path / place / f"checkpoints/global_step{end}" for place in ("whole", "parts")]
    assert differing_leaves(*last) == []
    assert read_json(last[0] / "sgt_state.json") == read_json(last[1] / "sgt_state.json")
    assert [record["step"] for record in reported(tmp_path / "parts", "resume")] == [0, INSIDE]


GROWN: list[tuple[str, Where, Where]] = [
    ("g_stack", PP2, PP2),
    ("g_stack", Where(pp=2, dp=2, zero=2), Where(pp=2, dp=2, zero=2)),
    ("msg_all", Where(pp=2, tp=2), Where(pp=2, tp=2)),
    ("auto_prog_ema", PP2, PP2),
    ("msg_all", PP2, ALONE),
    ("g_stack", ALONE, PP2),
    ("compound_grow", Where(dp=2, zero=3), Where(pp=2, tp=2)),
]
"""A method of growth, the layout up to the first boundary, and the one of the process that passes it."""


def train_stages(run_dir: Path, folder: Path, method: str, where: Where, stop: int | None = None) -> None:
    sections = {"parallel": {**where.parallel(), "device": "cpu"}, "train": {"exit_interval": stop}}
    config = staged_config(run_dir, data(folder), method, **sections, checkpoint={"save_interval": 2, "keep_last": 0})
    run_on_ranks(where.ranks, pretrain, config, backend=where.backend)


@pytest.mark.parametrize(("method", "there", "here"), share_of(GROWN, GROWN[:1]), ids=str)
def test_a_model_grows_over_its_stages(method: str, there: Where, here: Where, folder: Path, tmp_path: Path) -> None:
    """Its layers are cut anew; in the running process and in a new one, which may have another layout."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_stages(whole, folder, method, there)
    train_stages(parts, folder, method, there, FIRST)
    train_stages(parts, folder, method, here)
    assert [record["step"] for record in reported(parts, "resume")] == [0, FIRST]
    expected, found = measured_steps(whole), measured_steps(parts)
    assert [step["step"] for step in found] == list(range(1, LAST + 1))
    if there == here:
        assert found == expected and grow_records(parts) == grow_records(whole)
        for step in (FIRST, SECOND, LAST):
            name = f"checkpoints/global_step{step}"
            assert differing_leaves(whole / name, parts / name) == [], step
            assert read_json(whole / name / "sgt_state.json") == read_json(parts / name / "sgt_state.json")
    differences = [abs(one["loss"] - other["loss"]) for one, other in zip(expected, found, strict=True)]
    print(f"{method} {there} -> {here}: loss {max(differences):.1e}")
    assert max(differences) <= TOLERANCE


@pytest.mark.exhaustive
@pytest.mark.parametrize("where", [Where(pp=2, tp=2), INTERLEAVED, Where(pp=2, dp=2, zero=2)], ids=str)
def test_the_stock_conversion_of_deepspeed_accepts_the_checkpoint(where: Where, folder: Path, tmp_path: Path) -> None:
    root, _ = source(folder, where, "plain", INSIDE)
    checkpoint = root / f"global_step{INSIDE}"
    arguments = ["--input_folder", str(checkpoint), "--output_folder", str(tmp_path / "stock")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments, *workers]
    done = run_process(command, tmp_path, timeout=120)
    assert done.code == 0, done.err
    ours = open_source(checkpoint)
    for weight in (one for one in weights(ours.model) if one.split != "qkv"):  # of which no pattern knows the order
        for quantity in QUANTITIES:
            file = tmp_path / "stock/zero" / f"gpt.{weight.megatron}" / f"{quantity.replace('weights', 'fp32')}.pt"
            theirs = torch.load(file, weights_only=False)["param"]
            assert torch.equal(theirs, torch.cat(list(ours.whole(weight, quantity)[0].values()))), (weight, quantity)
