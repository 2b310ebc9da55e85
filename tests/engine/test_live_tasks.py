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
from tests.helpers.ranks import SHARED_MEMORY, run_on_ranks
from tests.helpers.runs import reported, tiny_config
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
        {"zero_stage": 3},
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
