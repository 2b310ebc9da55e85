"""lm-evaluation-harness on a task of our own making: through this package and on its own command line."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import pytest

from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.evaluation.downstream import run_tasks
from megatron_sgt.export.hf.open_model import open_model
from tests.helpers import grown_run
from tests.helpers.commands import run_process
from tests.helpers.tokenizers import TEXT

pytest.importorskip("lm_eval")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

CHOICE = """\
task: sgt_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """\
task: sgt_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of random words, as a multiple choice and as a text to predict."""
    folder = tmp_path_factory.mktemp("tasks")
    rng, words = random.Random(0), TEXT.split()
    rows = [
        {
            "question": " ".join(rng.choices(words, k=6)),
            "choices": [" fox", " zebra", " the dog"],
            "answer": i % 3,
        }
        for i in range(9)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("absent", CHOICE)):
        data = folder / ("data.jsonl" if name != "absent" else "no_such.jsonl")
        (folder / f"{name}.yaml").write_text(text.format(data=data).replace("sgt_choice", f"sgt_{name}"))
    return folder


@pytest.mark.exhaustive  # twenty seconds of imports, for what run_tasks does in this process
def test_the_command_line_of_the_harness_finds_the_same(tasks: Path, tmp_path: Path) -> None:
    opened = open_model(grown_run.checkpoints())
    ours = run_tasks(opened.model, opened.tokenizer, ["sgt_choice", "sgt_rolling"], tasks, batch_size=4)
    assert 0 <= ours["sgt_choice"]["acc"] <= 1 and ours["sgt_rolling"]["bits_per_byte"] > 0
    arguments = (
        f"--model hf --model_args pretrained={grown_run.export()},trust_remote_code=True,dtype=float32 --tasks "
        f"sgt_choice,sgt_rolling --include_path {tasks} --device cpu --batch_size 4 --output_path {tmp_path}/out"
    )
    done = run_process([sys.executable, "-m", "lm_eval", *arguments.split()], tmp_path)
    assert done.code == 0, done.err
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    for task, metric in (("sgt_choice", "acc"), ("sgt_choice", "acc_norm"), ("sgt_rolling", "bits_per_byte")):
        assert ours[task][metric] == pytest.approx(theirs[task][f"{metric},none"], rel=1e-6)


def test_what_cannot_be_run(tasks: Path) -> None:
    opened = open_model(grown_run.checkpoints())
    with pytest.raises(ConfigError, match="unknown: 'no_such_task'"):
        run_tasks(opened.model, opened.tokenizer, ["sgt_choice", "no_such_task"], tasks)
    with pytest.raises(DataError, match="the data of sgt_absent cannot be read"):
        run_tasks(opened.model, opened.tokenizer, ["sgt_absent"], tasks)
    with pytest.raises(DataError, match="no tokenizer"):
        run_tasks(opened.model, None, ["sgt_choice"], tasks)
