"""A checkpoint of a grown model, made in milliseconds: random weights, a schedule in the middle of a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.save import layout_of
from megatron_sgt.config import Config
from megatron_sgt.parallel.rng import rng_state
from tests.helpers.deepspeed_files import STEP, counters, random_state, write_checkpoint, write_manifest
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config

GROWN_STEP = STEP
ZERO_1: dict[str, Any] = {"zero_optimization": {"stage": 1}}
"""A ``deepspeed`` section that keeps ZeRO on a rank alone (see ``Config.zero_stage_on``)."""


def grown_config() -> Config:
    """Four layers of which two have been selected by GROWN_STEP."""
    growth = {"first_selection_step": 2, "window_size": 2, "max_selected_layers": 2, "max_loop_depth": 2}
    return small_config(growth={**growth, "num_keep_heads": 2})


def grown_schedule(config: Config) -> dict[str, object]:
    """The schedule's saved state: layer 3 looped twice since step 2, layer 1 in a window since step 6."""
    model = config.model
    return {
        "num_layers": model.num_layers,
        "num_heads": model.num_attention_heads,
        "config": config.growth.model_dump(mode="json"),
        "phase": "selecting",
        "step": GROWN_STEP,
        "window_end": 8,
        "grown": [
            {"layer": 3, "loops": 2, "kept_heads": [0, 3], "chosen_at": 2},
            {"layer": 1, "loops": 1, "kept_heads": [1, 2], "chosen_at": 6},
        ],
        "ema": [[0.5] * model.num_attention_heads] * model.num_layers,
    }


def write_grown_checkpoint(
    root: Path,
    where: tuple[int, int, int] = (2, 1, 1),
    pipeline: tuple[int, tuple[int, ...]] | None = None,
) -> Path:
    """A committed checkpoint at (tensor parallel, data parallel, ZeRO stage), see ``write_checkpoint``."""
    config = grown_config()
    folder = write_checkpoint(root, config, random_state(config), where, pipeline=pipeline)
    state = layout.read_json(folder / layout.STATE_FILE)
    hooks = {"growth": {"schedule": grown_schedule(config), "events": []}}
    layout.write_json(folder / layout.STATE_FILE, {**state, "hooks": hooks})
    write_manifest(folder)
    return folder


def write_plain_checkpoint(folder: Path, tokenizer: str | None = None, **sections: dict[str, Any]) -> Path:
    """A whole checkpoint of one rank at ZeRO 1 as far as its checks go: of weights it holds none."""
    folder.mkdir(parents=True)
    config, step = small_config(**{"deepspeed": ZERO_1, **sections}), layout.step_of(folder.name)
    where = layout_of(config, fake_groups())
    layout.write_json(folder / layout.STATE_FILE, {"trainer": counters(step), "layout": where, "hooks": {}})
    (folder / layout.CONFIG_FILE).write_text(config.to_yaml())
    for name in layout.files_of_rank(where, 0, 0):
        torch.save({"step": step, "padding": torch.zeros(1000)}, folder / name)
    torch.save(rng_state(torch.device("cpu")), folder / layout.rng_file(0))
    manifest.write_manifest(folder, {"layout": where, "tokenizer": tokenizer})
    return folder
