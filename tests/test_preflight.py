"""What is refused before a run starts, and before a job waits in a queue."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt import preflight
from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError, ConfigError, DataError
from megatron_sgt.growth import build_schedule
from megatron_sgt.planning.parameters import checkpoint_bytes, parameter_count
from megatron_sgt.stages.stages import stages_of
from tests.helpers.checkpoints import write_plain_checkpoint
from tests.helpers.runs import TINY, tiny_config, write_tiny_data
from tests.helpers.single import small_config


@pytest.fixture
def data(tmp_path: Path) -> str:
    return write_tiny_data(tmp_path)


def config(tmp_path: Path, data: str, /, **sections: dict[str, Any]) -> Config:
    return tiny_config(tmp_path / "run", data, **sections)


def write_checkpoint(root: Path, step: int, grown: bool = True) -> Path:
    """A folder that counts as a checkpoint of the tiny run."""
    folder = write_plain_checkpoint(root / layout.tag_for(step), model=TINY["model"])
    run = tiny_config(root, "data")
    schedule = build_schedule(run.growth, run.model.num_layers, run.model.num_attention_heads)
    hooks = {layout.GROWTH_STATE: {"schedule": schedule.state_dict(), "events": []}} if grown else {}
    state = layout.read_json(folder / layout.STATE_FILE)
    layout.write_json(folder / layout.STATE_FILE, {**state, "hooks": hooks})
    manifest.write_manifest(folder, {"layout": state["layout"]})
    layout.point_to(root, folder.name)
    return folder


def test_the_vocabulary_stays_what_it_is_without_a_tokenizer() -> None:
    config = small_config()
    assert preflight.with_vocabulary(config) == config


def test_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    preflight.check_surroundings(small_config(logging={"run_dir": str(tmp_path / "a" / "b")}))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match=r"logging.run_dir: cannot write to .*file/b: .*file is a file"):
        preflight.check_surroundings(small_config(logging={"run_dir": str(tmp_path / "file" / "b")}))
    spoilt = small_config(logging={"run_dir": str(tmp_path)}, checkpoint={"save": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match=r"checkpoint.save: cannot write"):
        preflight.check_surroundings(spoilt)


def test_changed_settings_are_named() -> None:
    there = small_config(optim={"lr": 0.5}, logging={"run_dir": "a"}, train={"exit_interval": 3})
    here = small_config(optim={"lr": 0.25}, logging={"run_dir": "b"}, deepspeed={"amp": {"enabled": False}})
    assert list(preflight._changes(there, here, 3)) == [
        "optim.lr 0.5 -> 0.25",
        "deepspeed.amp.enabled None -> False",
    ]
    assert list(preflight._changes(here, here, 3)) == []


def test_another_curriculum_says_whether_it_changes_the_past() -> None:
    plain, one, two = (
        small_config(data={"seq_length_curriculum": [{"until_steps": n, "seq_length": 16} for n in ends]})
        for ends in ((), (4,), (4, 8))
    )
    name = "data.seq_length_curriculum"
    assert list(preflight._changes(one, two, 4)) == [
        f"{name} 16 until step 4, then 32 -> 16 until step 4, 16 until step 8, then 32"
    ]
    past = " (of the 5 steps that are trained, too: they stay as they were)"
    assert list(preflight._changes(two, one, 5)) == [
        f"{name} 16 until step 4, 16 until step 8, then 32 -> 16 until step 4, then 32{past}"
    ]
    assert list(preflight._changes(plain, one, 0)) == [f"{name} none -> 16 until step 4, then 32"]


def test_tells_the_shape_of_the_run(tmp_path: Path, data: str) -> None:
    rows = dict(preflight.check_job(config(tmp_path, data), 2, "cpu"))
    assert rows["layout"] == "2 ranks = tensor parallel 1 x data parallel 2 · ZeRO-1 · fp32"
    assert rows["batch"] == "8 sequences = micro 2 x accumulation 2 x data parallel 2 · 128 tokens per step"
    assert rows["data"].startswith("120 documents")
    assert " free for " in rows["disk"] and "3 kept" in rows["disk"]
    assert rows["start"].startswith("FRESH START")
    assert not (tmp_path / "run").exists(), "nothing is written"


@pytest.mark.parametrize(("form", "certain"), [("none", True), ("unsure", False)])
def test_a_run_that_cannot_be_exported_is_told_or_refused(
    form: str, certain: bool, tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "export_problems", lambda _: iter([(f"no form: {form}", certain)]))
    rows = preflight.check_job(config(tmp_path, data), 2, "cpu")
    assert rows[-1] == ("WARNING", f"no form: {form}")
    assert preflight.check_export(small_config(huggingface={"check_at_start": "off"})) == []
    strict = config(tmp_path, data, huggingface={"check_at_start": "error"})
    if certain:
        with pytest.raises(ConfigError, match="no checkpoint of this run could be exported: no form: none"):
            preflight.check_job(strict, 2, "cpu")
    else:
        assert preflight.check_export(strict) == ["no form: unsure"]


def test_tells_how_a_pipeline_cuts_the_model(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    staged = config(tmp_path, data, parallel={"pipeline_model_parallel_size": 2})
    row = dict(preflight.check_job(staged, 2, "cpu"))["pipeline"]
    assert "layers · largest stage over the mean +" in row and "bubble of equal stages 20.0 %" in row
    assert preflight._pipeline_rows(staged, 2, ["numpy"]) == [("pipeline", "cut where the job starts: no numpy here")]


@pytest.mark.parametrize(
    ("sections", "error", "told"),
    [
        ({"train": {"global_batch_size": 6}}, ConfigError, "batch sizes do not multiply"),
        ({"logging": {"run_dir": f"{__file__}/run"}}, ConfigError, "logging.run_dir: cannot write"),
        ({"data": {"data_path": ["/nowhere/x"]}}, DataError, "/nowhere/x"),
        ({"data": {"data_path": []}}, DataError, "data_path is empty"),
        ({"checkpoint": {"load": "/nowhere"}}, CheckpointError, "no checkpoint at /nowhere"),
    ],
)
def test_refuses(
    tmp_path: Path, data: str, sections: dict[str, dict[str, Any]], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        preflight.check_job(config(tmp_path, data, **sections), 2, "cpu")


def test_files_are_looked_for_where_they_cannot_be_read(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    rows = dict(preflight.check_job(config(tmp_path, data), 2, "cpu"))
    assert rows["data"] == "1 data sets found, not read: no numpy here; the job reads them first"
    with pytest.raises(DataError, match="/nowhere/x"):
        preflight.check_job(config(tmp_path, data, data={"data_path": ["/nowhere/x"]}), 2, "cpu")
    tokenizer = {"tokenizer": {"type": "sentencepiece", "model": "/nowhere/t.model"}}
    with pytest.raises(DataError, match=r"no such file: /nowhere/t.model"):
        preflight.check_job(config(tmp_path, data, data=tokenizer), 2, "cpu")


def test_says_what_the_run_starts_from(tmp_path: Path, data: str) -> None:
    own, other = tmp_path / "run" / "checkpoints", tmp_path / "other"

    def start(run: Config) -> str:
        return preflight.find_start(run).sentence(run)

    found = preflight.find_start(config(tmp_path, data))
    assert (found.folder, found.changed) == (None, ())
    assert start(config(tmp_path, data)) == f"FRESH START: no checkpoint in {own}"
    write_checkpoint(other, 3)
    load = {"checkpoint": {"load": str(other)}}
    assert start(config(tmp_path, data, **load)) == f"START at step 3 of 18 from {other}/global_step3"
    folder = write_checkpoint(own, 7)
    for sections in ({}, load):
        assert start(config(tmp_path, data, **sections)) == f"RESUME at step 7 of 18 from {folder}"
    with pytest.raises(CheckpointError, match=r"another model: model.hidden_size is 32 there and 64 here"):
        start(config(tmp_path, data, model={"hidden_size": 64}))
    by_tokenizer = config(tmp_path, data)
    model = by_tokenizer.model.model_copy(update={"vocab_size": None})
    assert start(by_tokenizer.model_copy(update={"model": model})).startswith("RESUME at step 7")
    older = write_checkpoint(own, 5)
    layout.point_to(own, folder.name)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"123")
    said = start(config(tmp_path, data))
    assert said.startswith(f"RESUME at step 5 of 18 from {older} (passed over: checkpoint {folder} is damaged")
    (older / "mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"states.pt has 3 bytes instead of .*states.pt is missing"):
        start(config(tmp_path, data))


def test_a_run_that_is_done_is_not_submitted(tmp_path: Path, data: str) -> None:
    write_checkpoint(tmp_path / "run" / "checkpoints", 18)
    with pytest.raises(ConfigError, match=r"nothing to do: .*global_step18 is at step 18 of 18"):
        preflight.check_job(config(tmp_path, data), 2, "cpu")


def test_growth_that_is_missing_or_another_is_refused(tmp_path: Path, data: str) -> None:
    own = tmp_path / "run" / "checkpoints"
    write_checkpoint(own, 7)
    with pytest.raises(CheckpointError, match=r"checkpoint .*global_step7: .*window_size"):
        preflight.find_start(config(tmp_path, data, growth={"window_size": 5}))
    write_checkpoint(own, 9, grown=False)
    start = preflight.find_start(config(tmp_path, data))
    assert start.folder == own / "global_step7" and "global_step9 holds no growth state" in start.skipped[0]


@pytest.mark.parametrize(
    ("precision", "stage", "per_parameter"),
    [("fp32", 0, 12), ("fp32", 1, 16), ("bf16", 1, 14), ("fp16", 2, 14)],
)
def test_size_of_a_checkpoint(precision: str, stage: int, per_parameter: int) -> None:
    """Weights, two moments, and DeepSpeed's fp32 copy of the weights where it keeps one."""
    config = small_config(parallel={"zero_stage": stage})
    size = checkpoint_bytes(config, precision)
    assert size == per_parameter * parameter_count(config.model)


def test_the_largest_stage_must_fit_the_disk(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [{"until_steps": 5, "operator": "g_stack", "options": {"factor": 4}}]
    growing = config(tmp_path, data, growth={"stages": stages}, checkpoint={"keep_last": 2})
    large = checkpoint_bytes(stages_of(growing)[1].config, "fp32")
    assert large > checkpoint_bytes(growing, "fp32")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": large}))
    rows = dict(preflight.check_job(growing, 2, "cpu"))
    assert "the largest, 2 kept and 1 save between stages; " in rows["disk"]
    assert "g_stack after step 5: 20 layers" in rows["stages"]
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": large - 1}))
    with pytest.raises(CheckpointError, match="a checkpoint takes about"):
        preflight.check_job(growing, 2, "cpu")
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name == "numpy" else "found")
    rows = dict(preflight.check_job(growing, 2, "cpu"))
    assert rows["stages"] == "2, not checked: no numpy here; the job checks them first" and "each, 2" in rows["disk"]


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(checkpoint={"save": str(tmp_path / "deep" / "down"), "keep_last": 2})
    found = preflight.check_disk(config, "fp32")
    assert re.search(rf"2 kept; [1-9][\d.]* .?B free for {re.escape(str(tmp_path / 'deep' / 'down'))}$", found), found
    assert "each, 2 kept; " in preflight.check_disk(config, "fp32")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"takes about .*MB, but .*down has 1.00 kB free"):
        preflight.check_disk(config, "fp32")


def test_tasks_without_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = {"type": "sentencepiece", "model": "a.model"}
    sections = {"data": {"tokenizer": tokenizer}, "evaluation": {"tasks": ["words"]}}
    asked = small_config(logging={"run_dir": str(tmp_path)}, **sections)
    preflight.check_surroundings(asked)
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name == "lm_eval" else "found")
    with pytest.raises(ConfigError, match=r"evaluation\.tasks is set, but .*: run 'pip install megatron-sgt\[eval\]'"):
        preflight.check_surroundings(asked)
