"""A whole small run: what it leaves behind, and what it refuses before it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_sgt.config import Config, load_config
from megatron_sgt.data.measured_pairs import measured_pairs
from megatron_sgt.engine import session as session_module
from megatron_sgt.engine import stage as stage_module
from megatron_sgt.engine.dry_run import dry_run
from megatron_sgt.engine.loop import DivergedError
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.errors import CheckpointError, ConfigError, DataError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.guard import Progress
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo
from megatron_sgt.metrics import METRICS_FILE
from megatron_sgt.planning.flops import batch_flops
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def test_what_a_run_leaves_behind(data: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    config = tiny_config(run_dir, data, checkpoint={"save_interval": 9})
    run_on_ranks(2, pretrain, config)
    assert load_config(run_dir / "config.yaml") == config
    records = read_metrics(run_dir / METRICS_FILE)
    assert next(record["kind"] for record in records) == "resume"
    summary = records[-1]
    assert (summary["kind"], summary["step"], summary["reason"]) == ("summary", 18, "finished")
    steps = measured_steps(run_dir)
    assert (summary["first_loss"], summary["loss"]) == (steps[0]["loss"], steps[-1]["loss"])
    assert summary["loss"] < summary["first_loss"]
    assert summary["growth_events"] == len(reported(run_dir, "growth")) > 2
    assert summary["consumed_tokens"] == 18 * 8 * 16
    assert summary["valid_loss"] == reported(run_dir, "valid")[-1]["loss"]
    assert [record["step"] for record in reported(run_dir, "valid")] == [5, 10, 15, 18]
    assert [record["step"] for record in reported(run_dir, "save")] == [9, 18]
    assert all(Path(path).exists() for path in summary["paths"].values())
    assert Path(summary["paths"]["checkpoint"]).name == "global_step18"
    assert (run_dir / "checkpoints/latest").read_text() == "global_step18"


def test_the_split_of_the_batch_does_not_matter(data: str, tmp_path: Path) -> None:
    """Two ranks with two micro-batches each see the batches of one rank with four."""
    for ranks in (1, 2):
        run_on_ranks(ranks, pretrain, tiny_config(tmp_path / f"{ranks}", data, train={"exit_interval": 7}))
    one, two = (measured_steps(tmp_path / f"{ranks}") for ranks in (1, 2))
    assert [s["loss"] for s in two] == pytest.approx([s["loss"] for s in one], abs=2e-6)
    assert [s["grad_norm"] for s in two] == pytest.approx([s["grad_norm"] for s in one], rel=1e-4)
    valid = [[record["loss"] for record in reported(tmp_path / f"{ranks}", "valid")] for ranks in (1, 2)]
    assert valid[0] == pytest.approx(valid[1], abs=2e-6)


def test_exit_interval_stops_early_and_says_so(data: str, tmp_path: Path) -> None:
    run_on_ranks(1, pretrain, tiny_config(tmp_path, data, train={"exit_interval": 2}))
    [summary] = reported(tmp_path, "summary")
    assert summary["step"] == 2 and "stopped early" in summary["reason"]


def test_flops_are_of_the_documents_that_the_data_has(data: str, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data, train={"exit_interval": 1}, data={"reset_attention_mask": True})
    run_on_ranks(1, pretrain, config)
    pairs, model = measured_pairs(config), config.model
    assert pairs is not None and 0 < pairs.share(model.seq_length) < 1
    samples, plan = config.train.global_batch_size, LoopPlan.empty(model.num_layers)
    expected = batch_flops(config, plan, model.seq_length, samples, pairs).model
    assert reported(tmp_path, "train")[0]["model_flops_per_step"] == expected
    assert f"{config.train.train_iters * expected:.3g} FLOPs before growth" in dry_run(config, 1)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_diverging_run_stops_and_saves_nothing(zero: int, data: str, tmp_path: Path) -> None:
    sections = {
        "parallel": {"zero_stage": zero},
        "optim": {"lr": 1e20, "min_lr": 0, "lr_warmup_iters": 0},
        "checkpoint": {"save_interval": 1},
        "train": {"max_consecutive_skipped_steps": 2, "eval_interval": 0},
    }
    with pytest.raises(DivergedError, match="2 steps in a row after step 1 had no finite gradient") as caught:
        run_on_ranks(2, pretrain, tiny_config(tmp_path, data, **sections))
    assert caught.value.exit_code == 1
    steps = measured_steps(tmp_path)
    assert [step["step"] for step in steps] == [1, 1, 1]
    # Saved after the one good step, and never again.
    assert [record["step"] for record in reported(tmp_path, "save")] == [1]
    assert (tmp_path / "checkpoints/latest").read_text() == "global_step1"


def alone() -> RankInfo:
    return RankInfo(0, 1, 0, 1, LOOPBACK, 29500, "single")


def test_mistakes_are_refused_before_any_process_group(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a process group was started")

    monkeypatch.setattr("megatron_sgt.engine.session.start_processes", never)
    batches = tiny_config(tmp_path, data, train={"global_batch_size": 6, "micro_batch_size": 2})
    with pytest.raises(ConfigError, match="batch sizes do not multiply: global_batch_size 6"):
        PretrainingRun(batches, RankInfo(0, 2, 0, 2, LOOPBACK, 29500, "torchrun"))
    tokenizer = {"tokenizer": {"type": "sentencepiece", "model": str(tmp_path / "absent.model")}}
    with pytest.raises(DataError, match=r"absent\.model"):
        PretrainingRun(tiny_config(tmp_path, data, data=tokenizer), alone())
    with pytest.raises(ConfigError, match=r"'nowhere' of megatron_sgt\.hooks is not registered"):
        PretrainingRun(tiny_config(tmp_path, data, train={"hooks": ["nowhere"]}), alone())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"logging\.run_dir: cannot write to .*file"):
        PretrainingRun(tiny_config(tmp_path / "file", data), alone())


@pytest.mark.parametrize(
    ("sections", "kind", "message"),
    [
        ({"data": {"data_path": ["/nowhere/data"]}}, DataError, "/nowhere/data"),
        (
            {"checkpoint": {"load": "/nowhere/checkpoints"}},
            CheckpointError,
            "no checkpoint at /nowhere/checkpoints",
        ),
        ({"model": {"vocab_size": 16}}, DataError, "vocabulary"),
    ],
)
def test_what_rank_0_finds_wrong_is_raised_on_all_ranks(
    sections: dict[str, dict[str, object]], kind: type[Exception], message: str, data: str, tmp_path: Path
) -> None:
    results = run_on_ranks(2, catch, tiny_config(tmp_path, data, **sections))
    assert {name for name, _ in results} == {kind.__name__}
    assert all(message in text for _, text in results)


def catch(info: RankInfo, config: object) -> tuple[str, str]:
    try:
        pretrain(info, config)  # type: ignore[arg-type]
    except Exception as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def look_inside(info: RankInfo, config: Config) -> tuple[Any, ...]:
    """The phase in which the loops' kernels are compiled, and whether batches of (training, validation) lie in
    pinned memory, here and where the device is another."""
    watch = mock.Mock(progress=Progress())
    found: list[Any] = []
    with mock.patch.object(stage_module, "warm_up_loops") as warm_up:
        warm_up.side_effect = lambda *_: found.append(watch.progress.mark)
        run = PretrainingRun(config, info, watch=watch)
    found = [found[0].phase, found[0].quick]
    for device in (torch.device("cpu"), torch.device("meta")):
        run.groups = replace(run.groups, device=device)
        with (
            mock.patch.object(session_module, "TrainLoader") as train,
            mock.patch.object(stage_module, "EvalLoader") as valid,
            mock.patch.object(stage_module, "StragglerHook"),  # asks the device for its events
        ):
            run.valid_data = run.train_data
            run.stage.wire()
            run.open_loader(0)
        found += [call.kwargs["pin_memory"] for call in (train.call_args, valid.call_args)]
    return tuple(found)


def test_kernels_are_compiled_at_the_start_and_batches_pinned_for_gpus(data: str, tmp_path: Path) -> None:
    [found] = run_on_ranks(1, look_inside, tiny_config(tmp_path, data))
    assert found == ("compiling the kernels of the loops", False, False, False, True, True)
