"""Tasks of lm-evaluation-harness on the model of a run: what its checkpoint's export has, and training as without."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config import Config
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.evaluation.downstream import run_tasks
from megatron_sgt.export.hf.generate import Sampling, generate
from megatron_sgt.export.hf.open_model import open_model
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers import grown_run
from tests.helpers.commands import run_here
from tests.helpers.ranks import SHARED_MEMORY, run_on_ranks
from tests.helpers.runs import differing_leaves, measured_steps, pretrain, reported, tiny_config
from tests.helpers.tokenizers import TEXT

pytest.importorskip("lm_eval")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
"""
CHOICE = "doc_to_choice: choices\nmetric_list: [{metric: acc}, {metric: acc_norm}]"
ROLLING = "metric_list: [{metric: bits_per_byte}]"
UNTIL = """\
generation_kwargs: {until: ["no such text"], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]"""
NAMES = ["live_choice", "live_rolling", "live_until"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A choice among texts, texts to predict (one longer than the model sees), texts to continue."""
    folder = tmp_path_factory.mktemp("tasks")
    rng, words = random.Random(0), TEXT.split()
    texts = [" ".join(rng.choices(words, k=6)) for _ in range(7)]
    opened = open_model(grown_run.checkpoints())
    rows: list[dict[str, Any]] = [
        {"question": text, "continued": opened.tokenizer.decode(found.tokens)}
        for text, found in zip(texts, generate(opened, texts, Sampling(5, 0.0)), strict=True)
    ]
    for n, row in enumerate(rows):
        long = f"{TEXT} {TEXT} {row['question']}" if n == 3 else row["question"]
        row |= {"choices": [" fox", " the dog"], "answer": n % 2, "long": long}
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, kind, text, target, more in (
        ("choice", "multiple_choice", "{{long}}", "answer", CHOICE),
        ("rolling", "loglikelihood_rolling", "", "{{long}}", ROLLING),
        ("until", "generate_until", "{{question}}", "{{continued}}", UNTIL),
    ):
        filled = TASK.format(name=f"live_{name}", data=data, kind=kind, text=text, target=target, more=more)
        (folder / f"{name}.yaml").write_text(filled)
    return folder


def live_config(run_dir: Path, tasks: Path, /, **sections: dict[str, Any]) -> Config:
    """A run of the shape of ``grown_run``'s, with tasks."""
    grown_run.checkpoints()
    tokenizer = {"type": "sentencepiece", "model": str(grown_run.folder() / "sp.model")}
    ours: dict[str, dict[str, Any]] = {
        "model": {
            "vocab_size": None, "seq_length": grown_run.CONTEXT, "num_query_groups": 2, "qk_layernorm": True,
            "init_method_std": 0.1,
        },
        "data": {"tokenizer": tokenizer},
        "evaluation": {"tasks": NAMES, "include_path": str(tasks)},
    }  # fmt: skip
    merged = {name: {**ours.get(name, {}), **sections.get(name, {})} for name in {*ours, *sections}}
    return tiny_config(run_dir, grown_run.data_prefix(), **merged)


def measure(info: RankInfo, config: Config) -> None:
    """Load the checkpoint and run the tasks; for ``run_on_ranks``."""
    run = PretrainingRun(config, info)
    [hook] = [hook for hook in run.hooks if hook.name == "tasks"]
    hook.after_run(run.state)
    run.hub.close()
    run.folders.release()


@pytest.fixture(scope="module")
def expected(tasks: Path) -> dict[str, dict[str, Any]]:
    """What the harness's own kind of model finds."""
    opened = open_model(grown_run.checkpoints())
    return run_tasks(opened.model, opened.tokenizer, NAMES, tasks, batch_size=4)


@pytest.mark.parametrize(
    "parallel",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        pytest.param({"pipeline_model_parallel_size": 2}, marks=pytest.mark.exhaustive),
        pytest.param({"zero_stage": 3}, marks=pytest.mark.exhaustive),
    ],
    ids=["tensor", "pipeline", "zero3"],
)
def test_every_layout_finds_what_the_export_has(
    parallel: dict[str, Any], tasks: Path, expected: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    config = live_config(tmp_path, tasks, parallel=parallel, checkpoint={"load": str(grown_run.checkpoints())})
    backend = "gloo" if "pipeline_model_parallel_size" in parallel else SHARED_MEMORY
    run_on_ranks(2, measure, config, backend=backend)
    [record] = reported(tmp_path, "tasks")
    assert record["weights"] == "weights" and record["step"] == 18 and "failed" not in record
    assert expected["live_until"]["exact_match"] == 1.0
    for task, values in expected.items():
        assert record["results"][task] == pytest.approx(values, rel=1e-5), task


def test_training_does_not_notice_validation_and_tasks(tasks: Path, tmp_path: Path) -> None:
    """Bit for bit, with dropout, averaged weights and ZeRO-3; and what the run measures on the way."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
        "train": {"train_iters": 4, "ema_decay": 0.5, "eval_interval": 0},
        "growth": {"first_selection_step": 2, "window_size": 1},
        "parallel": {"zero_stage": 3},
    }
    alone = live_config(tmp_path / "alone", tasks, **sections, evaluation={"tasks": [], "include_path": None})
    run_on_ranks(2, pretrain, alone)
    evaluated = live_config(
        tmp_path / "evaluated",
        tasks,
        **{**sections, "train": {**sections["train"], "eval_interval": 2, "eval_at_start": True}},
        data={"valid": {"words": grown_run.data_prefix()}, "allow_validation_leak": True},
        evaluation={"tasks_interval": 2, "limit": 3},
    )
    run_on_ranks(2, pretrain, evaluated)
    assert measured_steps(tmp_path / "evaluated") == measured_steps(tmp_path / "alone")
    ends = [tmp_path / name / "checkpoints/global_step4" for name in ("alone", "evaluated")]
    assert differing_leaves(*ends) == []
    valid, done = reported(tmp_path / "evaluated", "valid"), reported(tmp_path / "evaluated", "tasks")
    assert [record["step"] for record in valid] == [0, 2, 4] and [record["step"] for record in done] == [2, 4]
    for record in valid:
        words = record["sets"]["words"]
        assert words["samples"] == 8 and words["tokens"] == 8 * grown_run.CONTEXT and words["loss"] != record["loss"]
        assert 0 < words["bits_per_byte"] < 8 and 0 < record["ema_bits_per_byte"] < 8
    assert valid[0]["loss"] == valid[0]["ema_loss"] and valid[2]["loss"] != valid[2]["ema_loss"]
    assert all(record["weights"] == "average" and set(record["results"]) == set(NAMES) for record in done)
    text = run_here("tools/evaluate.py", [str(ends[1]), "--valid-set", "words", "--json"], tmp_path)
    assert json.loads(text.out)["data"]["loss_with_padding"] == pytest.approx(
        valid[2]["sets"]["words"]["loss"], abs=1e-4
    )
