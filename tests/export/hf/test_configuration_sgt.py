"""The configuration of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from megatron_sgt.export.hf.rotary_sgt import SGTRotaryEmbedding
from tests.helpers.hf_models import hf_config, hf_model


def test_round_trip(tmp_path: Path) -> None:
    config = hf_config("grouped_qk_norm_depth_3")
    config.save_pretrained(tmp_path)
    again = SGTConfig.from_pretrained(tmp_path)
    assert again.sgt_loops == config.sgt_loops == {
        "3": {"heads": [0, 3], "depth": 3}, "1": {"heads": [0, 1, 2], "depth": 1},
    }  # fmt: skip
    assert (again.head_dim, again.num_key_value_heads, again.qk_norm) == (12, 2, True)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 500.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ],
)
def test_rotary_settings_given_to_from_pretrained_are_those_of_the_model(change: Any, tmp_path: Path) -> None:
    hf_model().save_pretrained(tmp_path)
    changed = type(hf_model()).from_pretrained(tmp_path, **change)
    changed.save_pretrained(tmp_path / "again")
    again = type(changed).from_pretrained(tmp_path / "again")
    config = hf_config(**change)
    assert changed.config.rope_parameters == again.config.rope_parameters == config.rope_parameters
    positions = torch.arange(8)[None]
    wanted = SGTRotaryEmbedding(config)(torch.zeros(1), positions)
    for model in (changed, again):
        assert all(map(torch.equal, model.model.rotary_emb(torch.zeros(1), positions), wanted))
    assert not torch.equal(wanted[0], hf_model().model.rotary_emb(torch.zeros(1), positions)[0])


def test_passes_count_every_attention() -> None:
    assert [hf_config("grouped_qk_norm_depth_3").passes_of(n) for n in range(4)] == [1, 2, 1, 4]
    assert [hf_config("block_loop").passes_of(n) for n in range(4)] == [1, 3, 2, 1]


@pytest.mark.parametrize(
    ("loops", "words"),
    [
        ({"4": {"heads": [0], "depth": 1}}, "layer 4 of a model with 4 layers"),
        ({"x": {"heads": [0], "depth": 1}}, "layer x"),
        ({"01": {"heads": [0], "depth": 1}}, "layer 01"),
        ({"1": {"block_loops": -1}}, "depth and block_loops count"),
        ({"1": {"heads": [0], "depth": -1}}, "depth and block_loops count"),
        ({"1": {"block_loop": 2}}, "others are heads, other_gate"),
        ({"1": {"heads": [0], "depth": 1, "other_gate": None}}, r"other_gate None; it is a number in \(0, 1\]"),
        ({"1": {"heads": [0], "depth": 1, "other_gate": 1.5}}, "other_gate 1.5"),
        ({"1": {"heads": [4], "depth": 1}}, r"heads \[4\] of layer 1, which has 4"),
        ({"1": {"heads": [0, 0], "depth": 1}}, r"heads \[0, 0\] to depth 1"),
        ({"1": {"heads": [0], "depth": 0}}, r"heads \[0\] to depth 0"),
        ({"1": {"heads": [], "depth": 1}}, r"heads \[\] to depth 1"),
    ],
)
def test_refuses_what_no_model_can_do(loops: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        hf_config(sgt_loops=loops)
    with pytest.raises(ValueError, match="normalization 'batch'"):
        hf_config(normalization="batch")
