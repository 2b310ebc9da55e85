"""lm-evaluation-harness on a task of our own making: through this package and on its own command line."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint.forms import read_config
from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.evaluation.downstream import Tasks, load_tasks, require_harness, run_tasks, task_manager
from megatron_sgt.export.forms import FORMS, STANDARD
from megatron_sgt.export.hf.generate import Sampling, generate
from megatron_sgt.export.hf.open_model import open_model
from megatron_sgt.export.to_hf import ExportOptions, export_checkpoint
from tests.helpers import grown_run
from tests.helpers.commands import run_process
from tests.helpers.deepspeed_files import write_checkpoint
from tests.helpers.exports import mild_state
from tests.helpers.single import small_config
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
UNTIL = """\
task: sgt_until
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{NAME}}}}"
generation_kwargs: {{until: ["no such text"], max_gen_toks: 6, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
GREEDY = Sampling(max_new_tokens=6, temperature=0.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that becomes a plain Llama, of the other one's tokenizer."""
    tokenizer = read_config(grown_run.checkpoints() / "global_step18").data.tokenizer
    assert tokenizer is not None
    model = {"vocab_size": grown_run.VOCAB_SIZE, "seq_length": grown_run.CONTEXT}
    config = small_config(model=model, growth={"method": "vanilla"}, data={"tokenizer": tokenizer.model_dump()})
    return write_checkpoint(tmp_path_factory.mktemp("plain"), config, mild_state(config), (1, 1, 1))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    """Questions of random words, as a multiple choice, as a text to predict, as one that each model continues."""
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
    for name, checkpoint in (("grown", grown_run.checkpoints()), ("plain", plain)):
        opened = open_model(checkpoint)
        for row, found in zip(rows, generate(opened, [str(row["question"]) for row in rows], GREEDY), strict=True):
            row[name] = opened.tokenizer.decode(found.tokens)
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("absent", CHOICE)):
        data = folder / ("data.jsonl" if name != "absent" else "no_such.jsonl")
        (folder / f"{name}.yaml").write_text(text.format(data=data).replace("sgt_choice", f"sgt_{name}"))
    for name in ("grown", "plain"):
        text = UNTIL.format(data=folder / "data.jsonl").replace("sgt_until", f"sgt_until_{name}").replace("NAME", name)
        (folder / f"until_{name}.yaml").write_text(text)
    return folder


def by_the_harness(folder: Path, tasks: list[str], definitions: Path) -> dict[str, dict[str, Any]]:
    """What the harness finds with its own model type ``hf``, from the code and the files in the folder."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args=f"pretrained={folder},trust_remote_code=True,dtype=float32,max_batch_size=4",
        tasks=tasks,
        task_manager=TaskManager(include_path=str(definitions), include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    return {
        name: {key.removesuffix(",none"): value for key, value in values.items() if isinstance(value, float)}
        for name, values in found["results"].items()
    }


@pytest.mark.parametrize("name", ["grown", "plain"])
def test_a_checkpoint_and_its_exports_have_the_same_numbers(
    name: str, tasks: Path, plain: Path, tmp_path: Path
) -> None:
    """Through tools/evaluate.py's function and through the harness's own model type, for every form of an export."""
    checkpoint = plain if name == "plain" else grown_run.checkpoints()
    wanted = ["sgt_choice", "sgt_rolling", f"sgt_until_{name}"]
    opened = open_model(checkpoint)
    expected = run_tasks(opened.model, opened.tokenizer, wanted, tasks, batch_size=4)
    assert expected[wanted[2]]["exact_match"] == 1, "the harness continues as tools/generate.py"
    assert 0 < expected["sgt_choice"]["acc"] <= 1 and expected["sgt_rolling"]["bits_per_byte"] > 0
    for form in FORMS.values() if name == "grown" else [STANDARD]:
        folder = tmp_path / form.name
        done = export_checkpoint(checkpoint, folder, options=ExportOptions(dtype="fp32", form=form))
        assert (done.form is None) == (name == "plain")
        opened = open_model(folder)
        ours = run_tasks(opened.model, opened.tokenizer, wanted, tasks, batch_size=4)
        theirs = by_the_harness(folder, wanted, tasks)
        for task, metric in ((t, m) for t in wanted for m, v in expected[t].items() if isinstance(v, float)):
            assert ours[task][metric] == pytest.approx(expected[task][metric], rel=1e-6), (form.name, task, metric)
            assert theirs[task][metric] == pytest.approx(expected[task][metric], rel=1e-6), (form.name, task, metric)


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


@pytest.mark.exhaustive  # ten seconds in which the harness reads the definitions of its own tasks
def test_a_task_that_the_harness_lacks(tasks: Path) -> None:
    with pytest.raises(ConfigError, match="unknown: 'no_such_task'"):
        run_tasks(None, object(), ["sgt_choice", "no_such_task"], tasks)


def test_a_task_that_no_folder_has(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an empty list of the harness's own."""
    from lm_eval.tasks import TaskManager

    found = partial(TaskManager, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: found(include_path=include_path))
    with pytest.raises(ConfigError, match="unknown: 'no_such_task'; 'lm_eval ls tasks' lists"):
        run_tasks(None, object(), ["sgt_choice", "no_such_task"], tasks)


def test_what_cannot_be_run(tasks: Path) -> None:
    opened = open_model(grown_run.checkpoints())
    with pytest.raises(DataError, match="the data of sgt_absent cannot be read"):
        run_tasks(opened.model, opened.tokenizer, ["sgt_absent"], tasks)
    with pytest.raises(DataError, match="no tokenizer"):
        run_tasks(opened.model, None, ["sgt_choice"], tasks)


def test_tasks_are_loaded_before_they_are_needed(tasks: Path) -> None:
    assert "sgt_choice" in load_tasks(Tasks(("sgt_choice",), tasks)).all_tasks
    with pytest.raises(DataError, match="the data of sgt_absent cannot be read"):
        load_tasks(Tasks(("sgt_absent",), tasks))


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--tasks needs .*: run 'pip install megatron-sgt\[eval\]'"):
        require_harness()


def test_a_folder_that_is_none() -> None:
    with pytest.raises(ConfigError, match="--include-path: /no/such is no folder"):
        task_manager(Tasks(("sgt_choice",), Path("/no/such")))
