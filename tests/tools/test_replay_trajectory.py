"""tools/replay_trajectory.py as a command: alone and on ranks that it starts, its output file and its exit codes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.helpers.commands import ROOT, Finished, run_process, run_script
from tests.helpers.trajectories import (
    GOLDEN,
    make_trajectory,
    read_trajectory,
    settings_of,
    write_trajectory,
)

TOOL = "tools/replay_trajectory.py"
AGREES = "all events equal, everything within tolerance"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trajectory of ten steps with two events."""
    path = tmp_path_factory.mktemp("short") / "short.safetensors"
    write_trajectory(path, *make_trajectory(settings_of("stopped_inside_a_window"), seed=0))
    return path


def repeat(path: Path, folder: Path, *arguments: str) -> Finished:
    return run_script(TOOL, [str(path), "--out", "out/repeated.safetensors", *arguments], folder, timeout=120)


def test_the_golden_trajectory(tmp_path: Path) -> None:
    done = repeat(GOLDEN, tmp_path, "--compare")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == AGREES
    for name in ("loss", "grad_norm", "ema_entropy", "head_decay", "probe_logits", "final weights"):
        assert f"{name:14s} max |difference| " in done.out
    golden, golden_meta = read_trajectory(GOLDEN)
    result, meta = read_trajectory(tmp_path / "out/repeated.safetensors")
    assert result.keys() == golden.keys()
    assert all(result[name].shape == golden[name].shape for name in golden)
    assert {name: meta[name] for name in golden_meta if name != "events"} == {
        name: value for name, value in golden_meta.items() if name != "events"
    }
    assert [event["action"] for event in meta["events"]] == [e["action"] for e in golden_meta["events"]]


def test_inputs_alone_are_enough(short: Path, tmp_path: Path) -> None:
    """What the file says about results is not read, so that it cannot leak into them."""
    tensors, meta = read_trajectory(short)
    inputs = {n: t for n, t in tensors.items() if n.startswith("init/") or n in ("tokens", "probe_tokens")}
    write_trajectory(tmp_path / "inputs.safetensors", inputs, {**meta, "events": []})
    assert repeat(tmp_path / "inputs.safetensors", tmp_path).code == 0
    result, found = read_trajectory(tmp_path / "out/repeated.safetensors")
    assert result.keys() == tensors.keys() and len(found["events"]) == len(meta["events"])


def shift(name: str) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] += 0.01

    return change


def other_event(tensors: dict[str, Any], meta: dict[str, Any]) -> None:
    meta["events"][0]["layer"] = 1


@pytest.mark.parametrize(
    ("perturb", "told"),
    [
        (shift("loss"), "loss differs by 1.00e-02, tolerance 3e-05"),
        (shift("final/model.norm.weight"), "final weights differs by 1.00e-02, tolerance 5e-04"),
        (other_event, "events differ"),
    ],
)
def test_a_difference_ends_with_1(perturb: Callable[..., None], told: str, short: Path, tmp_path: Path) -> None:
    tensors, meta = read_trajectory(short)
    perturb(tensors, meta)
    write_trajectory(tmp_path / "other.safetensors", tensors, meta)
    done = repeat(tmp_path / "other.safetensors", tmp_path, "--compare")
    assert done.code == 1 and done.err == "", done.err
    assert told in done.out and AGREES not in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--pipeline-parallel", "2", "--zero", "3"), 2, "zero_stage: 3 with pipeline_model_parallel_size 2"),
        (("--micro-batch", "3"), 2, "global_batch_size: 4 is not a multiple of train.micro_batch_size 3"),
        (("--zero", "4"), 2, "invalid choice: 4"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], code: int, told: str, short: Path, tmp_path: Path) -> None:
    done = repeat(short, tmp_path, *arguments)
    assert done.code == code and told in done.err and "Traceback" not in done.err, done.err


def test_a_file_that_is_no_trajectory(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("no")
    done = repeat(tmp_path / "x.safetensors", tmp_path)
    assert done.code == 3 and "x.safetensors is not a trajectory file" in done.err


def test_ranks_of_its_own(short: Path, tmp_path: Path) -> None:
    """They are torchrun's, which would take --virtual for an option of its own."""
    out = tmp_path / "repeated.safetensors"
    layout = ["--pipeline-parallel", "2", "--virtual", "2", "--zero", "2", "--recompute", "full", "--compare"]
    command = [sys.executable, str(ROOT / TOOL), str(short), "--out", str(out), *layout]
    done = run_process(command, tmp_path, timeout=180)
    assert done.code == 0, done.err
    assert done.out.count(AGREES) == 1, "rank 0 alone reports"
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["meta"])["steps"] == 10
