"""Checkpoints and exports of many kinds of models, without training, and what is wrong with a broken folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint import layout
from megatron_sgt.config import Config
from megatron_sgt.growth import build_schedule
from tests.helpers.deepspeed_files import STEP, State, random_state, write_checkpoint, write_manifest
from tests.helpers.single import small_config

COUNTERS = {"step": STEP, "consumed_samples": 14, "skipped_steps": 0, "consecutive_skipped": 0}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi_head": {},
    "grouped_query": {"num_query_groups": 2},
    "qk_norm": {"qk_layernorm": True, "num_query_groups": 2},
    "biases": {"add_bias_linear": True},
    "qkv_bias_qk_norm": {"add_qkv_bias": True, "qk_layernorm": True},
    "qkv_bias": {"add_qkv_bias": True, "num_query_groups": 1},
    "olmo2": {"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all", "num_query_groups": 2},
    "output_norms": {"norm_position": "output", "normalization": "LayerNorm", "add_qkv_bias": True},
    "tied_wide_padded": {
        "kv_channels": 24, "untie_embeddings_and_output_weights": False, "vocab_size": 101,
        "make_vocab_size_divisible_by": 16,
    },
    "layer_norm_gelu": {"normalization": "LayerNorm", "activation": "gelu", "add_bias_linear": True},
}  # fmt: skip


def export_config(variant: str, grown: bool = True, depth: int = 2) -> Config:
    """One of VARIANTS, that will have looped twice where ``grown``."""
    growth = {"first_selection_step": 2, "window_size": 2, "max_selected_layers": 2, "max_loop_depth": depth}
    return small_config(
        model={**VARIANTS[variant], "init_method_std": 0.1}, growth=growth if grown else {"method": "vanilla"}
    )


def write_run(root: Path, config: Config, where: tuple[int, int, int] = (1, 1, 1), depth: int = 2) -> Path:
    """A checkpoint of ``config`` with random weights; grown, if it grows: layers 3 and 1, 1 in a window."""
    folder = write_checkpoint(root, config, mild_state(config), where)
    model = config.model
    schedule = build_schedule(config.growth, model.num_layers, model.num_attention_heads).state_dict()
    if config.growth.method == "sgt":
        schedule |= {
            "phase": "selecting", "step": STEP, "window_end": 8,
            "grown": [
                {"layer": 3, "loops": depth, "kept_heads": [0, 3], "chosen_at": 2},
                {"layer": 1, "loops": 1, "kept_heads": [1, 2], "chosen_at": 6},
            ],
        }  # fmt: skip
    state = layout.read_json(folder / layout.STATE_FILE)
    hooks = {"growth": {"schedule": schedule, "events": []}}
    layout.write_json(folder / layout.STATE_FILE, {**state, "trainer": COUNTERS, "hooks": hooks})
    write_manifest(folder)
    return folder


def mild_state(config: Config) -> State:
    """Random weights of a size at which heads and loops matter and logits stay in the tens."""
    state = random_state(config)
    for name, tensor in state["weights"].items():
        tensor.mul_(0.15 if tensor.dim() > 1 else 0.2)
        if name.endswith("norm.weight"):
            tensor.add_(1.0)
    return state


def change_config(folder: Path, **values: Any) -> None:
    """Overwrite entries of an exported folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
