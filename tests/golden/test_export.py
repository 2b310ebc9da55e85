"""The authors' model, exported: its final weights give its recorded logits, through transformers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trajectory_parts.run import trajectory_config

from megatron_sgt.checkpoint import layout
from megatron_sgt.config import Config
from megatron_sgt.export.checked import checked_export
from megatron_sgt.export.hf.loading import load_exported
from megatron_sgt.export.to_hf import ExportOptions
from megatron_sgt.growth import build_schedule
from tests.helpers.deepspeed_files import write_checkpoint, write_manifest
from tests.helpers.trajectories import GOLDEN, read_trajectory
from tests.helpers.trajectory_runs import run_trajectory


def write_final(root: Path, config: Config, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """A checkpoint of a trajectory's final weights and structure, as two tensor-parallel ranks would save it."""
    weights = {name.removeprefix("final/"): t for name, t in tensors.items() if name.startswith("final/")}
    state = {"weights": weights, **{q: {n: torch.zeros_like(t) for n, t in weights.items()}
                                    for q in ("exp_avg", "exp_avg_sq")}}  # fmt: skip
    folder = write_checkpoint(root, config, state, (2, 2, 1))
    events = [event for event in meta["events"] if event["layer"] is not None]
    schedule = build_schedule(config.growth, config.model.num_layers, config.model.num_attention_heads)
    grown = [
        {
            "layer": event["layer"],
            "loops": int(tensors["loop_depth"][-1, event["layer"]]),
            "kept_heads": event["kept_heads"][str(event["layer"])],
            "chosen_at": event["step"],
        }
        for event in events
    ]
    saved = {**schedule.state_dict(), "phase": "fixed", "step": meta["steps"], "grown": grown}
    written = layout.read_json(folder / layout.STATE_FILE)
    counters = {"step": meta["steps"], "consumed_samples": 480, "skipped_steps": 0, "consecutive_skipped": 0}
    hooks = {"growth": {"schedule": saved, "events": events}}
    layout.write_json(folder / layout.STATE_FILE, {**written, "trainer": counters, "hooks": hooks})
    write_manifest(folder)


def exported_logits(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any], probe: Tensor) -> Tensor:
    write_final(folder / "ckpt", trajectory_config(tensors, meta, {}), tensors, meta)
    export, parity = checked_export(folder / "ckpt", folder / "hf", options=ExportOptions(dtype="fp32"))
    assert parity is not None and parity.passed
    with torch.no_grad():
        return load_exported(export.folder, torch.float32, trust=True)(probe.long()).logits


def test_the_golden_final_weights_give_the_golden_logits(tmp_path: Path) -> None:
    tensors, meta = read_trajectory(GOLDEN)
    found = exported_logits(tmp_path, tensors, meta, tensors["probe_tokens"])
    assert (found - tensors["probe_logits"]).abs().max() <= 1e-4


def test_the_final_weights_of_a_repeated_trajectory_do_so_too(tmp_path: Path) -> None:
    tensors, _ = read_trajectory(GOLDEN)
    result, final_meta = run_trajectory(GOLDEN)
    found = exported_logits(tmp_path, {**tensors, **result}, final_meta, tensors["probe_tokens"])
    assert (found - tensors["probe_logits"]).abs().max() <= 1e-3
