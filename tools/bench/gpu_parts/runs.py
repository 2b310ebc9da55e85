"""Whole runs in processes of their own: the authors' trajectory, and a run that is killed and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soak_parts.workload import write_data

from gpu_parts.machine import ROOT, Machine
from megatron_sgt.checkpoint.layout import latest_tag
from megatron_sgt.jsonl import read_metrics, without_void_records
from megatron_sgt.metrics import METRICS_FILE

STEPS, INTERVAL = 60, 10
KILLED_AFTER = 2 * INTERVAL
"""The kill comes once a checkpoint of this step is committed and training has gone on from it."""


def golden(machine: Machine) -> Iterator[dict[str, Any]]:
    """The authors' recorded run in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "tools/replay_trajectory.py",
            "tests/golden/a.safetensors",
            "--out",
            str(Path(folder, "repeated.safetensors")),
            "--compare",
            "--device",
            machine.device.type,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", errors="replace", check=False)
    lines = [line for line in done.stdout.splitlines() if "difference" in line]
    detail = "; ".join(" ".join(line.replace("max |difference|", "").split()) for line in lines)
    passed = done.returncode == 0
    yield {
        "check": "golden trajectory a, fp32",
        "passed": passed,
        "detail": detail if passed else f"{detail} {done.stderr.strip()[-200:]}",
    }


def killed_and_resumed(machine: Machine) -> Iterator[dict[str, Any]]:
    """pretrain_sgt.py grows, saves while it trains, is killed, and resumes: no step is missing.

    Steps that were made twice are compared by their losses.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "run.yaml"
        config.write_text(json.dumps(_config(machine, folder, write_data(folder))), encoding="utf-8")
        began = time.perf_counter()
        killed, tail = _start(config, folder, kill=True)
        until_killed = time.perf_counter() - began
        before, began, code = _records(folder), time.perf_counter(), 1
        if killed:
            code, tail = _start(config, folder, kill=False)
        row = judge(before, _records(folder))
    row |= {
        "until_killed_second": round(until_killed, 1),
        "resumed_second": round(time.perf_counter() - began, 1),
    }
    row["passed"] = bool(killed) and code == 0 and row["passed"]
    yield row if row["passed"] else row | {"detail": tail}


def _config(machine: Machine, folder: Path, data: str) -> dict[str, Any]:
    width, heads, length = (32, 2, 16) if machine.dry else (512, 8, 512)
    return {
        "model": {
            "num_layers": 4,
            "hidden_size": width,
            "num_attention_heads": heads,
            "ffn_hidden_size": 2 * width,
            "seq_length": length,
            "vocab_size": 64,
        },
        "growth": {
            "first_selection_step": 4,
            "window_size": 5,
            "num_keep_heads": 1,
            "max_selected_layers": 2,
        },
        "optim": {"lr": 1e-3, "lr_warmup_iters": 5},
        "parallel": {"device": machine.device.type, "zero_stage": 1},
        "train": {
            "train_iters": STEPS,
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "precision": "fp32" if machine.dry else "bf16",
            "loop_backend": "auto" if machine.backend == "triton" else "torch",
            "loop_attention": machine.attention,
        },
        "data": {"data_path": [data], "data_cache_path": f"{data}_cache", "split": "1,0,0"},
        "checkpoint": {"save_interval": INTERVAL, "async_save": True, "keep_last": 2, "keep_every": 0},
        "logging": {"run_dir": str(folder / "run"), "log_interval": 1, "progress_bar": "off"},
    }


def _start(config: Path, folder: Path, kill: bool) -> tuple[int, str]:
    """Start the run. ``kill``: (1 if it was killed in the midst of it, the last output), else (exit code, ...)."""
    with Path(folder, "log").open("w+", encoding="utf-8") as log:
        command = [sys.executable, "pretrain_sgt.py", "--config", str(config)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            while kill and process.poll() is None and not _is_beyond(folder / "run"):
                time.sleep(0.01)
            if kill and process.poll() is None:
                process.kill()
                process.wait()
                return 1, ""
            code = process.wait()
        finally:
            process.kill()
        log.seek(0)
        return 0 if kill else code, log.read()[-300:]


def _is_beyond(run: Path) -> bool:
    """Whether a checkpoint of KILLED_AFTER is committed and a later step is recorded."""
    tag = latest_tag(run / "checkpoints") if (run / "checkpoints").is_dir() else None
    if tag is None or int("".join(c for c in tag if c.isdigit())) < KILLED_AFTER:
        return False
    return _losses(read_metrics(run / METRICS_FILE))[-1][0] > KILLED_AFTER


def _losses(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]


def _records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / METRICS_FILE
    return read_metrics(file) if file.exists() else []


def judge(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run's records say at its death and at its end; ``passed``: grown, resumed, every step there once."""
    counted = without_void_records(after)
    first, final = dict(_losses(before)), dict(_losses(counted))
    resumed = next((r["step"] for r in counted if r["kind"] == "resume" and r.get("step")), None)
    repeated = [step for step in first if resumed is not None and step > resumed and step in final]
    loops = max((sum(r["loop_depth"]) for r in counted if r["kind"] == "train"), default=0)
    return {
        "steps": len(final),
        "resumed_at": resumed,
        "repeated": len(repeated),
        "loops": loops,
        "largest_difference": max((abs(first[step] - final[step]) for step in repeated), default=None),
        "passed": sorted(final) == list(range(1, STEPS + 1)) and bool(repeated) and loops > 0,
    }
