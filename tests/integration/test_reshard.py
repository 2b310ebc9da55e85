"""A run that resumes under another layout continues: other tensor-parallel and data-parallel sizes, other ZeRO
stages, inside a window and after it."""

from __future__ import annotations

import json
import sys
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sgt.checkpoint.manifest import read_manifest, write_manifest
from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.checkpoint.reshard.rank_state import QUANTITIES
from megatron_sgt.checkpoint.reshard.sibling import sibling_of
from tests.helpers.commands import run_process
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
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
from tests.helpers.runs import (
    differing_leaves,
    measured_steps,
    pretrain,
    reported,
    tiny_config,
    write_tiny_data,
)

Layout = tuple[int, int, int]
"""Tensor-parallel size, data-parallel size, ZeRO stage."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    **EVERYWHERE,
    "grouped": {
        "model": {
            "num_query_groups": 2, "qk_layernorm": True, "make_vocab_size_divisible_by": 40,
            "untie_embeddings_and_output_weights": False,
        },
    },
    "offload": {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}},
    "small_sub_groups": {"deepspeed": {"zero_optimization": {"sub_group_size": 3000}}},
}  # fmt: skip
"""Several are named "one+another"."""

Pair = tuple[Layout, Layout, int, str]
PAIRS: list[Pair] = [
    ((1, 1, 0), (1, 2, 1), INSIDE, "plain"),
    ((1, 1, 0), (4, 1, 2), AFTER, "plain"),
    ((1, 1, 0), (1, 2, 3), INSIDE, "plain"),
    ((1, 2, 1), (2, 1, 0), AFTER, "plain"),
    ((1, 2, 1), (1, 3, 2), INSIDE, "plain"),
    ((1, 2, 1), (1, 2, 3), AFTER, "plain"),
    ((2, 1, 1), (4, 1, 1), INSIDE, "plain"),
    ((2, 1, 1), (1, 2, 2), AFTER, "plain"),
    ((1, 2, 2), (2, 1, 0), INSIDE, "plain"),
    ((1, 2, 2), (1, 1, 3), AFTER, "plain"),
    ((4, 1, 2), (2, 2, 1), INSIDE, "plain"),
    ((4, 1, 2), (1, 2, 3), AFTER, "plain"),
    ((1, 2, 3), (1, 1, 0), INSIDE, "plain"),
    ((1, 2, 3), (2, 1, 1), INSIDE, "plain"),
    ((1, 2, 3), (2, 1, 2), AFTER, "plain"),
    ((1, 2, 1), (2, 2, 3), INSIDE, "plain"),
    ((2, 1, 3), (1, 2, 1), AFTER, "plain"),
    ((1, 2, 1), (1, 2, 3), INSIDE, "two_groups"),
    ((1, 2, 3), (2, 1, 0), AFTER, "two_groups"),
    ((1, 2, 1), (2, 1, 1), INSIDE, "grouped"),
    ((1, 2, 3), (1, 3, 3), AFTER, "small_sub_groups"),
    ((1, 2, 1), (1, 2, 3), INSIDE, "offload"),
    ((1, 2, 3), (2, 1, 2), AFTER, "offload"),
    ((1, 2, 1), (1, 2, 3), INSIDE, "dropout"),
    ((1, 2, 1), (1, 2, 3), INSIDE, "bf16"),
    ((1, 2, 3), (2, 1, 1), AFTER, "bf16"),
    ((1, 2, 1), (1, 2, 3), INSIDE, "two_groups+dropout"),
    ((1, 2, 3), (1, 3, 3), AFTER, "offload+small_sub_groups"),
]
SHARE: list[Pair] = [
    ((1, 1, 0), (1, 2, 3), INSIDE, "plain"),
    ((1, 2, 1), (1, 3, 2), INSIDE, "plain"),
    ((2, 1, 1), (4, 1, 1), INSIDE, "plain"),
    ((1, 2, 2), (2, 1, 0), INSIDE, "plain"),
    ((4, 1, 2), (1, 2, 3), AFTER, "plain"),
    ((1, 2, 3), (1, 1, 0), INSIDE, "plain"),
    ((1, 2, 1), (1, 2, 3), INSIDE, "two_groups+dropout"),
    ((1, 2, 1), (2, 1, 1), INSIDE, "grouped"),
    ((1, 2, 3), (1, 3, 3), AFTER, "offload+small_sub_groups"),
    ((1, 2, 3), (2, 1, 1), AFTER, "bf16"),
]
"""What `make test` takes."""


def test_the_share_meets_what_the_matrix_meets() -> None:
    """Every variant, every layout saved from and loaded under at each tensor-parallel size and stage."""

    def met(pairs: list[Pair]) -> set[object]:
        sizes = {
            (name, layout[place])
            for pair in pairs
            for name, layout in zip(("there", "here"), pair[:2], strict=True)
            for place in range(3)
        }
        variants = {variant for pair in pairs for variant in pair[3].split("+")}
        return sizes | {pair[2:] for pair in pairs if pair[3] == "plain"} | variants

    assert met(SHARE) == met(PAIRS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data and every run."""
    return tmp_path_factory.mktemp("reshard")


@pytest.fixture(scope="module")
def data(folder: Path) -> str:
    return write_tiny_data(folder)


def run(
    run_dir: Path, data: str, where: Layout, variant: str, stop: int | None = None, **checkpoint: Any
) -> dict[int, dict[str, Any]]:
    """Train in new processes up to step ``stop``; returns what every step measured."""
    tp_size, dp_size, stage = where
    ours = {
        "parallel": {"tensor_model_parallel_size": tp_size, "zero_stage": stage},
        "train": {"exit_interval": stop},
        "checkpoint": checkpoint,
    }
    sections = merged(reduce(merged, (VARIANTS[name] for name in variant.split("+")), BASE), ours)
    run_on_ranks(tp_size * dp_size, pretrain, tiny_config(run_dir, data, **sections))
    return {record["step"]: record for record in measured_steps(run_dir)}


@cache
def source(folder: Path, data: str, where: Layout, variant: str) -> tuple[Path, dict[int, dict[str, Any]]]:
    """An uninterrupted run: its folder of checkpoints, and what it measured."""
    run_dir = folder / "from_{}_{}_{}_{}".format(variant, *where)
    return run_dir / "checkpoints", run(run_dir, data, where, variant)


def compare(expected: dict[int, dict[str, Any]], found: dict[int, dict[str, Any]], saved_at: int) -> list[float]:
    """Loss differences of the next steps; everything that is not rounded differently must be equal."""
    assert list(found) == list(range(saved_at + 1, saved_at + STEPS + 1))
    for step, record in found.items():
        for name in ("lr", "consumed_samples", "loop_depth", "other_gates", "phase"):
            assert record[name] == expected[step][name], (step, name)
    return [abs(record["loss"] - expected[step]["loss"]) for step, record in found.items()]


@pytest.mark.parametrize(("there", "here", "saved_at", "variant"), share_of(PAIRS, SHARE))
def test_losses_continue(
    there: Layout, here: Layout, saved_at: int, variant: str, folder: Path, data: str, tmp_path: Path
) -> None:
    root, expected = source(folder, data, there, variant)
    load = str(root / f"global_step{saved_at}")
    found = run(tmp_path / "run", data, here, variant, load=load, save_interval=0, stop=saved_at + STEPS)
    differences = compare(expected, found, saved_at)
    print(f"{variant} {there} -> {here} at {saved_at}: {max(differences):.1e}, first {differences[0]:.1e}")
    assert max(differences) <= (BF16_TOLERANCE if variant == "bf16" else TOLERANCE)
    growth = [r for r in reported(root.parent, "growth") if saved_at < r["step"] <= saved_at + STEPS]
    assert [(r["step"], r["kept_heads"]) for r in reported(tmp_path / "run", "growth")] == [
        (r["step"], r["kept_heads"]) for r in growth
    ]


def test_the_steps_that_are_saved_are_where_they_claim_to_be(folder: Path, data: str) -> None:
    _, steps = source(folder, data, (1, 2, 1), "plain")
    assert any(0 < gate < 1 for gate in steps[INSIDE]["other_gates"].values())
    assert steps[AFTER]["phase"] == steps[INSIDE + STEPS]["phase"] == "fixed"
    assert sum(steps[AFTER]["loop_depth"]) > sum(steps[INSIDE]["loop_depth"]) > 0


@pytest.mark.parametrize("here", [(1, 3, 1), (4, 1, 2), (1, 3, 3), (2, 2, 3)])
def test_the_whole_state_survives_bit_for_bit(here: Layout, folder: Path, data: str, tmp_path: Path) -> None:
    """Weights, both moments and the step, from DeepSpeed's files of one layout into those of another."""
    root, _ = source(folder, data, (2, 1, 1), "plain")
    layout = {"parallel": {"tensor_model_parallel_size": here[0], "zero_stage": here[2]}}
    config = tiny_config(tmp_path / "run", data, **merged(BASE, layout))
    checkpoint = root / f"global_step{AFTER}"
    saved = tmp_path / "saved"
    notes = run_on_ranks(here[0] * here[1], load_and_save, config, checkpoint, saved)
    assert f"zero_stage 1 -> {here[2]}" in notes[0] or here[2] == 1
    before, *_ = convert(checkpoint, tmp_path / "before")
    after, *_ = convert(saved / f"global_step{AFTER}", tmp_path / "after")
    for quantity in QUANTITIES:
        name = f"{quantity}-00001-of-00001.safetensors"
        assert (before / name).read_bytes() == (after / name).read_bytes()
    states = [json.loads((where / "sgt_state.json").read_text()) for where in (before, after)]
    assert states[0]["layout_free"]["optimizer_step"] == states[1]["layout_free"]["optimizer_step"] == AFTER
    assert states[0]["hooks"] == states[1]["hooks"]


@pytest.mark.parametrize("here", [pytest.param((1, 2, 0), marks=pytest.mark.exhaustive), (2, 1, 1), (1, 2, 3)])
def test_the_resumed_run_resumes_exactly(here: Layout, folder: Path, data: str, tmp_path: Path) -> None:
    """Once under the new layout, a second stop changes no bit: dropout, moments and steps included."""
    root, _ = source(folder, data, (1, 1, 2), "dropout")
    load = str(root / f"global_step{INSIDE}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, data, here, "dropout", load=load, save_interval=0, stop=INSIDE + 6)
    run(parts, data, here, "dropout", load=load, save_interval=0, stop=INSIDE + 3)
    run(parts, data, here, "dropout", save_interval=0, stop=INSIDE + 6)
    assert measured_steps(parts) == measured_steps(whole)
    last = f"checkpoints/global_step{INSIDE + 6}"
    assert differing_leaves(whole / last, parts / last) == []


def test_a_run_resumes_its_own_checkpoints_under_another_layout(folder: Path, data: str, tmp_path: Path) -> None:
    """The automatic way, from checkpoint.save: converted once, read the second time, removed with the original."""
    run_dir = tmp_path / "run"
    root = run_dir / "checkpoints"
    run(run_dir, data, (1, 2, 1), "plain", save_interval=0, stop=INSIDE)
    copy = sibling_of(root / f"global_step{INSIDE}")
    run(run_dir, data, (1, 1, 3), "plain", save_interval=0, keep_last=2, stop=INSIDE + 2)
    made = copy.stat().st_mtime_ns
    (root / "latest").write_text(f"global_step{INSIDE}")
    run(run_dir, data, (1, 1, 2), "plain", save_interval=0, keep_last=2, stop=INSIDE + 2)
    assert copy.stat().st_mtime_ns == made
    run(run_dir, data, (2, 1, 1), "plain", save_interval=0, keep_last=2, stop=INSIDE + 4)
    kept = sorted(path.name for path in root.glob("global_step*"))
    assert kept == ["global_step5", "global_step5.universal", "global_step7"]


def test_the_tool_makes_the_checkpoint_that_a_run_would(folder: Path, data: str, tmp_path: Path) -> None:
    root, expected = source(folder, data, (2, 1, 1), "plain")
    convert(root / f"global_step{AFTER}", tmp_path / "any")
    found = run(
        tmp_path / "run",
        data,
        (1, 2, 3),
        "plain",
        load=str(tmp_path / "any"),
        save_interval=0,
        stop=AFTER + STEPS,
    )
    assert max(compare(expected, found, AFTER)) <= TOLERANCE


@pytest.mark.parametrize("damage", ["step", "exp_avg", "exp_avg_sq", "weights"])
def test_losses_do_not_continue_from_another_state(damage: str, folder: Path, data: str, tmp_path: Path) -> None:
    """The negative control: what the comparison would miss, it would be no test of."""
    root, expected = source(folder, data, (2, 1, 1), "plain")
    copy, *_ = convert(root / f"global_step{INSIDE}", tmp_path / "any")
    if damage == "step":
        file = copy / "sgt_state.json"
        text = file.read_text()
        file.write_text(text.replace(f'"optimizer_step": {INSIDE}', '"optimizer_step": 7'))
        assert file.read_text() != text
    else:
        path = copy / f"{damage}-00001-of-00001.safetensors"
        tensors = load_file(path)
        tensors["model.layers.2.mlp.down_proj.weight"] *= 1.1
        save_file(tensors, path)
    # Sealed again: a changed file alone is refused by its checksum.
    about = {k: v for k, v in read_manifest(copy).items() if k not in ("version", "tag", "files")}
    write_manifest(copy, about)
    found = run(tmp_path / "run", data, (1, 2, 1), "plain", load=str(copy), save_interval=0, stop=INSIDE + STEPS)
    assert max(compare(expected, found, INSIDE)) > 3 * TOLERANCE


def test_the_stock_conversion_of_deepspeed_accepts_the_checkpoint(folder: Path, data: str, tmp_path: Path) -> None:
    root, _ = source(folder, data, (2, 1, 1), "plain")
    checkpoint = root / f"global_step{INSIDE}"
    arguments = ["--input_folder", str(checkpoint), "--output_folder", str(tmp_path / "stock")]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *arguments, *workers]
    done = run_process(command, tmp_path, timeout=120)
    assert done.code == 0, done.err
    ours, *_ = convert(checkpoint, tmp_path / "ours")
    whole = load_file(ours / "exp_avg-00001-of-00001.safetensors")
    theirs = tmp_path / "stock" / "zero"
    pieces = {
        "gpt.embedding.word_embeddings.weight": [whole["model.embed_tokens.weight"]],
        "gpt.decoder.layers.1.mlp.linear_fc1.weight": [
            whole[f"model.layers.1.mlp.{name}_proj.weight"] for name in ("gate", "up")
        ],
        "gpt.decoder.layers.1.mlp.linear_fc2.weight": [whole["model.layers.1.mlp.down_proj.weight"]],
        "gpt.decoder.final_layernorm.weight": [whole["model.norm.weight"]],
    }
    for name, tensors in pieces.items():
        merged_by_deepspeed = torch.load(theirs / name / "exp_avg.pt", weights_only=False)["param"]
        assert torch.equal(merged_by_deepspeed, torch.cat(tensors)), name
