"""A run of three phases: killed and started again around every boundary it is the same run, under other layouts too."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint.contents import read_contents
from megatron_sgt.checkpoint.layout import read_json
from megatron_sgt.config import Config
from megatron_sgt.engine.hooks.base import Hook
from megatron_sgt.engine.hooks.spike import LossSpike
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError
from megatron_sgt.export.source import open_checkpoint
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import differing_leaves, measured_steps, pretrain, reported, tiny_config, write_tiny_data

END = 9
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
Layout = tuple[int, int, int, int]
"""Tensor-parallel, pipeline-parallel, data-parallel size, ZeRO stage."""
ALONE: Layout = (1, 1, 1, 0)
EVERY: list[Layout] = [(2, 1, 1, 0), (1, 2, 1, 1), (2, 2, 1, 1), *((1, 1, 2, zero) for zero in range(4))]


@cache
def data_in(root: Path) -> tuple[str, str]:
    for name in ("one", "other"):
        (root / name).mkdir()
    return write_tiny_data(root / "one"), write_tiny_data(root / "other", seed=6)


def phases_in(root: Path) -> list[dict[str, Any]]:
    """Boundaries after steps 3 and 6; the batch goes on from 4 to 8 after step 4."""
    one, other = data_in(root)
    return [
        {"until_steps": 3, "name": "stable"},
        {
            "until_tokens": 16 * (3 * 4 + 4 + 2 * 8),
            "global_batch_size": [4, 8],
            "seq_length": 8,
            "rotary_base": 1000.0,
            "data_path": f"0.5 {one} 0.5 {other}",
        },
        {
            "lr_decay_style": "linear",
            "min_lr": 0.0,
            "seq_length": 16,
            "rotary_scaling": YARN,
            "data_path": other,
            "name": "annealing",
        },
    ]


def run_config(root: Path, name: str, where: Layout = ALONE, stop: int | None = None, **changes: Any) -> Config:
    parallel = {
        "tensor_model_parallel_size": where[0],
        "pipeline_model_parallel_size": where[1],
        "zero_stage": where[3],
    }
    return tiny_config(
        root / name,
        data_in(root)[0],
        phases=changes.pop("phases", phases_in(root)),
        parallel=parallel,
        growth={"first_selection_step": 2, "window_size": 2, "max_loop_depth": 1},
        optim={"lr": 3e-3, "lr_decay_style": "constant", "lr_warmup_iters": 2},
        train={
            "train_iters": END,
            "micro_batch_size": 1,
            "global_batch_size": 4,
            "eval_interval": 3,
            "exit_interval": stop,
            **changes.pop("train", {}),
        },
        checkpoint={"keep_last": 0, **changes.pop("checkpoint", {})},
        **changes,
    )


def train(root: Path, name: str, where: Layout, *stops: int | None, **changes: Any) -> Path:
    """The folder of a run that is killed after each of ``stops``, and started again."""
    backend = {"backend": "gloo"} if where[1] > 1 else {}
    for stop in stops:
        run_on_ranks(
            where[0] * where[1] * where[2], pretrain, run_config(root, name, where, stop, **changes), **backend
        )
    return root / name


class SpikeOnce(Hook):
    """Sends the run back after its fourth step, which is the first of the second phase."""

    name = "spike_once"
    has_sent = False

    def after_step(self, state: TrainState, result: StepResult) -> None:
        if state.step == 4 and not self.has_sent:
            self.has_sent = True
            raise LossSpike(4, 9.0, 8.0, state.consumed_samples)


def pretrain_with_a_spike(info: RankInfo, config: Config) -> None:
    PretrainingRun(config, info, hooks=[SpikeOnce()]).train()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phases")


@cache
def whole(root: Path) -> Path:
    return train(root, "whole", ALONE, None)


@cache
def parts(root: Path) -> Path:
    """Ended before, at and behind each boundary."""
    return train(root, "parts", ALONE, 2, 3, 4, 6, 7, None)


def test_every_step_has_the_settings_of_its_phase(root: Path) -> None:
    train_records = reported(whole(root), "train")
    assert [record["global_batch_size"] for record in train_records] == [4, 4, 4, 4, 8, 8, 8, 8, 8]
    assert [record["consumed_samples"] for record in train_records] == [4, 8, 12, 16, 24, 32, 40, 48, 56]
    assert [record["consumed_tokens"] for record in train_records][-1] == 56 * 16
    assert [record["seq_length"] for record in train_records] == [16] * 3 + [8] * 3 + [16] * 3
    assert [record["lr"] for record in train_records] == pytest.approx(
        [1.5e-3, *[3e-3] * 5, 2e-3, 1e-3, 0.0], abs=1e-12
    )
    assert [record["loops"] for record in train_records][-1] > 0, "growth counts steps through the phases"
    told = [(record["step"], record["name"], record["last_step"]) for record in reported(whole(root), "phase")]
    assert told == [(0, "stable", 3), (3, "phase 2", 6), (6, "annealing", 9)]
    assert reported(whole(root), "length") == [], "the phase says its length"


def test_a_run_that_is_killed_around_the_boundaries_is_the_same_bit_for_bit(root: Path) -> None:
    assert measured_steps(parts(root)) == measured_steps(whole(root))
    valid = [{r["step"]: r["loss"] for r in reported(run, "valid")} for run in (whole(root), parts(root))]
    assert set(valid[0]) == {3, 6, END} and valid[0].items() <= valid[1].items()
    one, other = (run / f"checkpoints/global_step{END}" for run in (whole(root), parts(root)))
    assert differing_leaves(one, other) == []
    assert read_json(one / "sgt_state.json") == read_json(other / "sgt_state.json")


@pytest.mark.parametrize(("tp_size", "pp_size", "dp_size", "zero"), share_of(EVERY, [(2, 1, 1, 0), (1, 1, 2, 2)]))
def test_another_layout_takes_the_same_steps(tp_size: int, pp_size: int, dp_size: int, zero: int, root: Path) -> None:
    """From the checkpoint of one rank at the first boundary."""
    where = (tp_size, pp_size, dp_size, zero)
    resumed = f"resumed_{'_'.join(map(str, where))}"
    load = {"load": str(parts(root) / "checkpoints" / "global_step3")}
    steps = measured_steps(train(root, resumed, where, 6, None, checkpoint=load))
    for step, wanted in zip(steps, measured_steps(whole(root))[3:], strict=True):
        assert step["loss"] == pytest.approx(wanted["loss"], abs=1e-5), step["step"]
        assert step["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-5), step["step"]
        assert (step["step"], step["consumed_samples"], step["lr"]) == (
            wanted["step"],
            wanted["consumed_samples"],
            wanted["lr"],
        )


def test_a_checkpoint_has_the_positions_of_the_phase_that_wrote_it(root: Path) -> None:
    found = []
    for step in (3, 4, 6, 7, END):
        folder = parts(root) / f"checkpoints/global_step{step}"
        details = read_contents(folder, lambda _: []).details
        assert details is not None and details.model == open_checkpoint(folder).config.model
        found.append((details.model.rotary_base, details.model.rotary_scaling is not None))
    assert found == [(10000.0, False), (1000.0, False), (1000.0, False), (1000.0, True), (1000.0, True)]


def test_validation_at_a_boundary_is_that_of_the_phase_which_ends(root: Path) -> None:
    """At step 3 the model that a run without phases has, at step 6 other positions."""
    before = train(root, "plain", ALONE, 3, phases=[])
    (plain,) = (record["loss"] for record in reported(before, "valid"))
    assert reported(whole(root), "valid")[0]["loss"] == plain


def test_a_run_that_goes_back_over_a_boundary_is_in_the_phase_before_again(root: Path) -> None:
    """From there on it is the run that a new process starts from the same checkpoint, past the same samples."""
    run_on_ranks(1, pretrain_with_a_spike, run_config(root, "spike", stop=7, checkpoint={"save_interval": 2}))
    told = [(record["step"], record["name"]) for record in reported(root / "spike", "phase")]
    assert told[-3:] == [(2, "stable"), (3, "phase 2"), (6, "annealing")]
    load = {"load": str(root / "spike" / "checkpoints" / "global_step2")}
    again = measured_steps(train(root, "again", ALONE, 7, checkpoint=load))
    assert again == measured_steps(root / "spike")[2:] and len(again) == 5
    assert again[0]["consumed_samples"] == 4 * 4 + 4, "the samples up to the spike are passed over"


def test_phases_that_have_begun_cannot_change_and_later_ones_may(root: Path) -> None:
    stable, middle, last = phases_in(root)
    load = {"load": str(parts(root) / "checkpoints" / "global_step4")}
    other = train(root, "later", ALONE, None, phases=[stable, middle, {**last, "lr": 1e-3}], checkpoint=load)
    assert reported(other, "resume")[0]["changed"][0].startswith("phases stable until step 3 (batch 4, T 16); phase 2")
    assert reported(other, "train")[-3]["lr"] == pytest.approx(1e-3 * 2 / 3)
    with pytest.raises(CheckpointError, match=r"phases\[1\] has begun: rotary_base of step 4 was 1000.0 there and is"):
        train(root, "refused", ALONE, None, phases=[stable, {**middle, "rotary_base": 2e3}, last], checkpoint=load)
