"""The record of a rank's collectives: which of torch's recorders is read, and what lies in the run directory."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_sgt.guard import flight_recorder
from tests.helpers.single import single_groups, small_config

C10D = torch._C._distributed_c10d


def test_a_cpus_collectives_are_recorded(tmp_path: Path) -> None:
    single_groups(small_config())
    dist.all_reduce(torch.ones(3))
    said = flight_recorder.write(tmp_path / "run", 3)
    path = tmp_path / "run" / "rank_00003.collectives.json"
    assert said == f"its last collectives: {path}" and not flight_recorder.queues_collectives()
    (last,) = json.loads(path.read_text())["entries"][-1:]
    assert last["profiling_name"] == "gloo:all_reduce" and last["input_sizes"] == [[3]]
    entries = pickle.loads((tmp_path / "run" / "nccl_trace_rank_3").read_bytes())["entries"]
    names = [frame["name"] for frame in entries[-1]["frames"]]
    assert "test_a_cpus_collectives_are_recorded" in names, "with the stack that asked for it"


def test_a_gpus_collectives_are_in_a_recorder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(C10D, "_dump_nccl_trace_json", lambda: '{"entries": ["of NCCL"]}', raising=False)
    monkeypatch.setattr(C10D, "_dump_nccl_trace", lambda: b"pickle", raising=False)
    flight_recorder.write(tmp_path, 0)
    assert flight_recorder.queues_collectives()
    assert json.loads((tmp_path / "rank_00000.collectives.json").read_text()) == {"entries": ["of NCCL"]}
    assert (tmp_path / "nccl_trace_rank_0").read_bytes() == b"pickle"


def test_a_torch_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.delattr(C10D, "_dump_nccl_trace_json", raising=False)
    assert "no flight recorder" in flight_recorder.write(tmp_path / "run", 0)
    assert not (tmp_path / "run").exists()


def test_torchs_own_dump_goes_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FR_DUMP_TEMP_FILE", "/chosen/by_the_user_")
    monkeypatch.delenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", raising=False)
    flight_recorder.let_torch_write_to(tmp_path)
    assert os.environ["TORCH_FR_DUMP_TEMP_FILE"] == "/chosen/by_the_user_"
    assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == str(tmp_path / "nccl_trace_rank_")
