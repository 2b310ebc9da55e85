"""Whole runs that begin with the weights of another: other layout, blend and length, loops kept or grown anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.config import Config, parse_config, recorded_config
from megatron_sgt.data.gpt_dataset import build_datasets
from megatron_sgt.data.loader import EvalLoader
from megatron_sgt.data.tokenizer import tokenizer_of
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.evaluation.perplexity import mean_loss
from megatron_sgt.export import card
from megatron_sgt.export.source import open_checkpoint
from megatron_sgt.growth import LoopPlan
from megatron_sgt.jsonl import read_metrics
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.metrics import METRICS_FILE
from megatron_sgt.metrics.summary import run_summary
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.reporting import report
from megatron_sgt.reporting.run_data import load_run
from tests.helpers import grown_run
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import pretrain, reported, write_tiny_data

DEEPSPEED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
LAYOUTS: dict[str, dict[str, Any]] = {
    "keep": {"parallel": {"tensor_model_parallel_size": 1, "zero_stage": 3}, "deepspeed": DEEPSPEED},
    "restart": {"parallel": {"tensor_model_parallel_size": 2, "zero_stage": 3}, "deepspeed": DEEPSPEED},
}
"""The old run had tensor parallel 2 without ZeRO."""


def old_config() -> Config:
    return recorded_config(layout.resolve(grown_run.checkpoints()) / layout.CONFIG_FILE)


def new_config(folder: Path, growth: str) -> Config:
    """Twice as long sequences of another blend, for three steps of which the first process takes two."""
    values = old_config().model_dump()
    blend = ("0.3", grown_run.data_prefix(), "0.7", write_tiny_data(folder))
    changes: dict[str, dict[str, Any]] = {
        "model": {"seq_length": 2 * grown_run.CONTEXT},
        "data": {"data_path": blend, "data_cache_path": None},
        "growth": {"first_selection_step": 2},
        "train": {
            "train_iters": 3,
            "exit_interval": 2,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "eval_interval": 0,
        },
        "checkpoint": {"load": str(grown_run.checkpoints()), "start": "weights", "growth": growth, "save_interval": 0},
        "logging": {"run_dir": str(folder / "run")},
        **LAYOUTS[growth],
    }
    return parse_config(values | {name: {**values[name], **change} for name, change in changes.items()})


def begin(info: RankInfo, config: Config, old: Config) -> dict[str, Any]:
    """Losses of what was loaded on the old run's validation batches, with its loops and without; then train."""
    run = PretrainingRun(config, info)
    groups, train = run.groups, old.train
    valid = build_datasets(old, tokenizer_of(old.data))[1]
    count = old.num_micro_batches(groups.dp_size)
    batches = EvalLoader(valid, train.micro_batch_size, count, groups.dp_rank, groups.dp_size, train.eval_iters)
    plan = run.schedule.plan
    seen: dict[str, Any] = {"plan": plan, "counters": run.state.state_dict(), "phase": run.schedule.phase}
    for name, one in (("plain", LoopPlan.empty(config.model.num_layers)), ("kept", plan)):
        apply_plan(run.runtime.model, one)
        seen[name] = mean_loss(run.runtime.engine, batches, groups)
    run.train()
    return seen


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Of each way the run's folder and what rank 0 has seen; the one that keeps its loops was started twice."""
    found = {}
    for growth in LAYOUTS:
        folder = tmp_path_factory.mktemp(growth)
        config = new_config(folder, growth)
        seen = run_on_ranks(2, begin, config, _alone(old_config()))[0]
        if growth == "keep":
            whole = config.train.model_copy(update={"exit_interval": None})
            run_on_ranks(2, pretrain, config.model_copy(update={"train": whole}))
        found[growth] = folder / "run", seen
    return found


def _alone(old: Config) -> Config:
    """Its data, for ranks that share it as data-parallel ones or not."""
    parallel = old.parallel.model_copy(update={"tensor_model_parallel_size": 1})
    return old.model_copy(update={"parallel": parallel})


def test_the_first_loss_is_the_last_of_the_old_run(begun: Any) -> None:
    (_, kept), (_, anew) = begun["keep"], begun["restart"]
    assert kept["kept"] == pytest.approx(grown_run.validation_losses()[18], abs=1e-5)
    assert kept["plain"] == pytest.approx(anew["plain"], abs=1e-5) and abs(kept["plain"] - kept["kept"]) > 1e-3
    for seen in (kept, anew):
        assert not any(seen["counters"].values())


def test_loops_stay_or_grow_anew(begun: Any) -> None:
    (run, kept), (other, anew) = begun["keep"], begun["restart"]
    old = open_checkpoint(grown_run.checkpoints()).plan()
    new = open_checkpoint(run / "checkpoints")
    assert kept["plan"] == new.plan(training_gates=True) == old and old.layers and kept["phase"] == "fixed"
    assert reported(run, "growth") == [] and new.details.step == 3
    assert anew["plan"] == LoopPlan.empty(5) and anew["phase"] == "vanilla"
    assert [event["step"] for event in reported(other, "growth")] == [2]


def test_it_is_a_run_of_its_own_that_goes_on_from_its_own_checkpoints(begun: Any) -> None:
    run, _ = begun["keep"]
    first, second = reported(run, "resume")
    assert (first["step"], first["consumed_samples"], first["path"]) == (
        0,
        0,
        str(layout.resolve(grown_run.checkpoints())),
    )
    assert (second["step"], second["path"]) == (2, str(run / "checkpoints/global_step2")) and "origin" not in second
    steps = reported(run, "train")
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert steps[0]["lr"] == pytest.approx(old_config().optim.lr / 3), "the warm-up begins again"
    [record] = layout.read_json(run / "checkpoints/global_step3" / layout.STATE_FILE)[layout.DATA_STATE]
    assert record["from_sample"] == 0 and len(record["files"]) == 2, "one order from the first sample on"
    old_run, new_run = (
        manifest.read_manifest(layout.resolve(root))["run"] for root in (grown_run.checkpoints(), run / "checkpoints")
    )
    assert old_run != new_run


def test_every_record_tells_where_it_began(begun: Any) -> None:
    run, _ = begun["keep"]
    old = manifest.read_manifest(layout.resolve(grown_run.checkpoints()))
    origin = manifest.read_manifest(run / "checkpoints/global_step3")[layout.ORIGIN_STATE]
    assert (origin["run"], origin["step"], origin["tokens"]) == (old["run"], 18, old["tokens"])
    told = f"(step 18, {old['tokens']:,} tokens), loops kept"
    assert told in run_summary(read_metrics(run / METRICS_FILE), run) and told in report._began(load_run(run))
    details = open_checkpoint(run / "checkpoints").details
    assert details.began == origin
    assert card._began(details) == (
        " Its run began with the weights of step 18 of another run, which had been trained on "
        f"{old['tokens']:,} tokens before."
    )
