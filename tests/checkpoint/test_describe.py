"""Contents as text: one screen for a run, every fact of a checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.contents import read_contents, read_root
from megatron_sgt.checkpoint.describe import describe, describe_root
from megatron_sgt.checkpoint.manifest import size_problems
from tests.helpers.checkpoints import write_grown_checkpoint


def test_a_checkpoint_in_full(tmp_path: Path) -> None:
    text = describe(read_contents(write_grown_checkpoint(tmp_path), size_problems))
    for line in (
        "global_step7: complete, 8 files",
        "  step      7 of 10",
        "  tokens    448 (14 sequences of 32)",
        "4 layers, hidden 64, 4 heads of 16 in 4 groups, swiglu 96, vocabulary 128 in 128 rows",
        "  layout    tensor_model_parallel_size 2, data_parallel_size 1, zero_stage 1",
        "  growth    sgt, phase selecting, its window ends at step 8, 2 layers selected",
        "            layer 3: depth 2, kept heads 0 3, selected at step 2\n",
        "            layer 1: depth 1, kept heads 1 2, selected at step 6, other heads at gate 0.5",
    ):
        assert line in text, text


def test_the_sources_of_the_data(tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path)
    file = {"weight": 1.0, "prefix": "data/a", "documents": 9, "tokens": 900, "lengths": "x", "content": "y"}
    order = {"dataset": "indexed", "seed": 1, "split": "1", "shares": [1.0, 0.0, 0.0]}
    first = {**order, "from_sample": 0, "seq_length": 32, "files": [{**file, "samples": 25}]}
    second = {**first, "from_sample": 10, "origin": 10, "seq_length": 64, "places": [{"number": 0, "drawn": 5}]}
    second["files"] = [{**file, "samples": 12}]
    state = layout.read_json(folder / layout.STATE_FILE)
    for record, told in (
        ([first], "448 (14 sequences of 32)\n  data      data/a: 448 tokens, 0.56 epochs\n"),
        ([first, second], "576 (14 sequences of several lengths)\n  data      data/a: 576 tokens, 0.75 epochs\n"),
        ([{**first, "files": [file]}], "\n  data      data/a: 448 tokens\n"),
    ):
        layout.write_json(folder / layout.STATE_FILE, {**state, layout.DATA_STATE: record})
        assert told in describe(read_contents(folder, lambda _: []))


def test_a_pipeline(tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path, (1, 1, 0), pipeline=(2, (2, 2)))
    text = describe_root(read_root(tmp_path, size_problems))
    assert "TP1 PP2 DP1 Z0" in text and "pipeline_model_parallel_layout 2,2" in text
    state = layout.read_json(folder / layout.STATE_FILE)
    state["layout"][layout.PIPELINE_COUNTS] = [1, 1, 1, 1]
    layout.write_json(folder / layout.STATE_FILE, state)
    assert "TP1 PP2xVP2 DP1 Z0" in describe_root(read_root(tmp_path, lambda _: []))


def test_the_stages_of_a_model_that_has_grown(tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path)
    assert "  stage " not in describe(read_contents(folder, size_problems))
    same = {"moments": "copy", "optimizer": "continue", "lr_policy": "continue"}
    records = [
        {"step": 3, "operator": "midas", "options": {"block_size": 2}, **same, "weights": "weights"},
        {"step": 5, "operator": "grad_stack", "options": {}, **same, "weights": "ema"},
    ]
    state = layout.read_json(folder / layout.STATE_FILE)
    layout.write_json(folder / layout.STATE_FILE, {**state, layout.STAGES_STATE: records})
    found = read_contents(folder, lambda _: [])
    assert found.details is not None and list(found.details.stages) == json.loads(json.dumps(records))
    text, rest = describe(found), "moments copy, optimizer continue, learning rate continue\n"
    assert "  stage     2, since step 5\n" in text
    assert f"            stage 1: midas (block_size 2) after step 3; {rest}" in text
    assert f"            stage 2: grad_stack after step 5, of the averaged weights; {rest}" in text


def test_a_run_is_a_table_with_its_latest_and_its_damaged(tmp_path: Path) -> None:
    folder = write_grown_checkpoint(tmp_path)
    shutil.copytree(folder, tmp_path / "global_step6")
    next((tmp_path / "global_step6").glob("*.pt")).unlink()
    shutil.copytree(folder, tmp_path / "global_step8.tmp")
    found = read_root(tmp_path, size_problems)
    later = max(one.saved_at or 0.0 for one in found.checkpoints) + 7200
    text = describe_root(found, now=later).splitlines()
    assert text[0] == f"{tmp_path}: latest is global_step7"
    assert text[1].startswith("  global_step6      2h00m ago") and text[1].endswith("damaged")
    assert "TP2 DP1 Z1" in text[2] and "3[0,3]x2 1[1,2]" in text[2] and text[2].endswith("complete <- latest")
    assert text[3].startswith("  global_step8.tmp  ") and text[3].endswith("unfinished")
    assert [line for line in text if line.startswith("  ! ")] == ["  ! " + found.checkpoints[0].problems[0]]
    assert len(text) < 30
