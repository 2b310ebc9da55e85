"""A run that begins with shorter sequences: the steps of a plain-PyTorch loop on the same pieces, under every layout,
and bit for bit the same after a stop."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.layout import read_json
from megatron_sgt.config import Config
from megatron_sgt.data.gpt_dataset import build_datasets
from megatron_sgt.metrics.records import TrainRecord
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.reference_growth import in_order
from tests.helpers.reference_sgt import Params, ReferenceSchedule, forward
from tests.helpers.runs import differing_leaves, measured_steps, pretrain, reported, tiny_config, write_tiny_data
from tests.helpers.single import single_model
from tests.helpers.variants import hf_of, leaves, reference_settings

LENGTHS = (4, 4, 4, 8, 8, 8, 8, 16, 16, 16)
"""Of the steps: the curriculum as the run's data says it, and the full length."""
END = len(LENGTHS)
CURRICULUM = [{"until_steps": 3, "seq_length": 4}, {"until_tokens": 7 * 8 * 16, "seq_length": 8}]
RUN: dict[str, dict[str, Any]] = {
    "growth": {"first_selection_step": 2, "window_size": 2, "max_loop_depth": 1},
    "optim": {"lr": 3e-3, "lr_decay_style": "constant", "lr_warmup_iters": 0},
    "train": {"train_iters": END, "eval_interval": 0},
    "data": {"seq_length_curriculum": CURRICULUM},
}
SPREAD = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
Layout = tuple[int, bool, int, int]
"""Tensor-parallel size, sequence parallel, data-parallel size, ZeRO stage."""
EVERY: list[Layout] = [(1, False, 1, 0), (2, True, 1, 1), (2, False, 1, 0), *((1, False, 2, n) for n in range(4))]


def run_config(run_dir: Path, data: str, where: Layout = (1, False, 1, 0), /, **sections: dict[str, Any]) -> Config:
    """Four micro-batches of two samples on one data-parallel rank, two on each of two."""
    parallel = {"tensor_model_parallel_size": where[0], "sequence_parallel": where[1], "zero_stage": where[3]}
    merged = {name: {**RUN.get(name, {}), **sections.get(name, {})} for name in {*RUN, *sections}}
    return tiny_config(run_dir, data, parallel=parallel, deepspeed=SPREAD if where[3] == 3 else {}, **merged)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("curriculum")


@cache
def data_in(root: Path) -> str:
    return write_tiny_data(root)


@cache
def whole_run(root: Path, where: Layout = (1, False, 1, 0)) -> Path:
    """The folder of a run to the end."""
    folder = root / "_".join(map(str, where))
    run_on_ranks(where[0] * where[2], pretrain, run_config(folder, data_in(root), where))
    return folder


class Reference:
    """A model, its optimizer and its schedule in plain PyTorch."""

    def __init__(self, config: Config, params: Params) -> None:
        layers = len({name.split(".")[2] for name in params if name.startswith("model.layers.")})
        self.params = leaves(params)
        self.model = {**reference_settings(config), "num_layers": layers}
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        self.schedule = ReferenceSchedule(config.growth.model_dump(), layers, config.model.num_attention_heads)


def by_reference(config: Config, stacked_after: int | None = None) -> list[dict[str, Any]]:
    """The same steps, samples in order and cut by slices; the layers are stacked after step ``stacked_after``."""
    reference = Reference(config, hf_of(single_model(config), config))
    samples = build_datasets(config, None)[0]
    found = []
    for step, length in enumerate(LENGTHS):
        if step == stacked_after:
            layers = 2 * list(range(config.model.num_layers))
            reference = Reference(config, in_order({n: p.detach() for n, p in reference.params.items()}, layers))
        params, schedule, optimizer = reference.params, reference.schedule, reference.optimizer
        optimizer.zero_grad()
        losses, entropies = [], []
        gates = torch.tensor(schedule.gates)
        for first in range(8 * step, 8 * step + 8, 2):
            cuts = [
                {name: samples[index][name][begin : begin + length] for name in ("tokens", "labels")}
                for index in (first, first + 1)
                for begin in range(0, 16, length)
            ]
            tokens, labels = (torch.stack([one[name] for one in cuts]) for name in ("tokens", "labels"))
            scores, measured = forward(params, tokens, reference.model, schedule.loops, gates, {})
            loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()) / 4
            loss.backward()
            losses.append(float(loss.detach()))
            entropies.append(measured)
        norm = torch.nn.utils.clip_grad_norm_(list(params.values()), 1.0)
        optimizer.step()
        per_layer = zip(*entropies, strict=True)
        schedule.fold([[torch.stack(p).mean(0).tolist() for p in zip(*layer, strict=True)] for layer in per_layer])
        schedule.act(step + 1)
        found.append(
            {
                "loss": sum(losses),
                "norm": float(norm),
                "loops": list(schedule.loops),
                "ema": torch.tensor(schedule.ema),
            }
        )
    return found


@cache
def expected_steps(root: Path) -> list[dict[str, Any]]:
    return by_reference(run_config(root / "reference", data_in(root)))


@pytest.mark.parametrize(
    ("tp_size", "sharded", "dp_size", "stage"),
    share_of(EVERY, [(1, False, 1, 0), (2, True, 1, 1), (1, False, 2, 3)]),
)
def test_steps_are_those_of_plain_pytorch_on_the_same_pieces(
    tp_size: int, sharded: bool, dp_size: int, stage: int, root: Path
) -> None:
    steps = measured_steps(whole_run(root, (tp_size, sharded, dp_size, stage)))
    for number, (step, expected) in enumerate(zip(steps, expected_steps(root), strict=True)):
        assert step["loss"] == pytest.approx(expected["loss"], abs=3e-5), number
        assert step["grad_norm"] == pytest.approx(expected["norm"], rel=1e-5), number
        assert step["loop_depth"] == expected["loops"], number
        if step["ema_entropy"] is not None:
            found = torch.tensor(step["ema_entropy"])
            assert torch.allclose(found, expected["ema"].to(found.dtype), atol=1e-5), number
    assert [step["consumed_samples"] for step in steps] == [8 * number for number in range(1, END + 1)]
    assert any(steps[-1]["loop_depth"]) and steps[3]["ema_entropy"] is not None


def test_the_run_tells_its_lengths(root: Path) -> None:
    train: list[TrainRecord] = reported(whole_run(root), "train")  # type: ignore[assignment]
    assert tuple(record["seq_length"] for record in train) == LENGTHS
    changes = [(r["step"], r["previous_seq_length"], r["seq_length"]) for r in reported(whole_run(root), "length")]
    assert changes == [(3, 4, 8), (7, 8, 16)]


def test_a_stopped_run_goes_on_bit_for_bit(root: Path) -> None:
    """Stopped inside an entry, and where one ends; the second part's future is another one at first."""
    parts, whole = root / "parts", whole_run(root, (1, False, 2, 1))
    later = [*CURRICULUM, {"until_steps": 9, "seq_length": 2}]
    for stop, entries in ((2, CURRICULUM), (7, later), (None, CURRICULUM)):
        changes = {"train": {"exit_interval": stop}, "data": {"seq_length_curriculum": entries}}
        run_on_ranks(2, pretrain, run_config(parts, data_in(root), (1, False, 2, 1), **changes))
    assert measured_steps(parts) == measured_steps(whole)
    folder = f"checkpoints/global_step{END}"
    assert differing_leaves(whole / folder, parts / folder) == []
    states = [read_json(run / folder / "sgt_state.json") for run in (whole, parts)]
    assert states[0] == states[1]
    changed = [record["changed"] for record in reported(parts, "resume")]
    first, second = "4 until step 3, 8 until step 7, then 16", "4 until step 3, 8 until step 7, 2 until step 9, then 16"
    name = "data.seq_length_curriculum"
    assert changed == [[], [f"{name} {first} -> {second}"], [f"{name} {second} -> {first}"]]


def test_the_full_length_is_no_curriculum(root: Path) -> None:
    for name, entries in (("none", []), ("full", [{"until_steps": 3, "seq_length": 16}])):
        sections = {"data": {"seq_length_curriculum": entries}, "train": {"train_iters": 4}}
        run_on_ranks(1, pretrain, run_config(root / name, data_in(root), **sections))
    assert measured_steps(root / "none") == measured_steps(root / "full")
    folder = "checkpoints/global_step4"
    assert differing_leaves(root / "none" / folder, root / "full" / folder) == []
    assert reported(root / "full", "length") == []


def test_a_growing_model_keeps_the_curriculum_in_one_process_and_in_two(root: Path) -> None:
    """The model is stacked between two lengths that the entries change two steps before and two after."""
    after = 5
    stage = {"until_steps": after, "operator": "g_stack", "options": {"factor": 2}}
    sections = {"model": {"num_layers": 2}, "growth": {"method": "vanilla", "stages": [stage]}}
    where = (2, True, 1, 1)
    for name, stops in (("one", [None]), ("two", [after, None])):
        for stop in stops:
            changes = {**sections, "train": {"exit_interval": stop}}
            run_on_ranks(2, pretrain, run_config(root / name, data_in(root), where, **changes))
    steps = measured_steps(root / "one")
    assert measured_steps(root / "two") == steps
    plain = {"model": {"num_layers": 2}, "growth": {"method": "vanilla"}}
    for step, expected in zip(
        steps, by_reference(run_config(root / "plain", data_in(root), **plain), after), strict=True
    ):
        assert step["loss"] == pytest.approx(expected["loss"], abs=3e-5), step["step"]
        assert step["grad_norm"] == pytest.approx(expected["norm"], rel=1e-5), step["step"]
    assert tuple(record["seq_length"] for record in reported(root / "one", "train")) == LENGTHS
    (grow,) = reported(root / "one", "grow")
    (shorter,) = [r["model_flops_per_step"] for r in reported(root / "one", "train") if r["step"] == after]
    assert grow["flops_per_token_before"] == shorter / (8 * 16), "at the length that goes on"
