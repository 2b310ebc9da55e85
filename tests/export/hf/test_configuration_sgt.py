"""The configuration of an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from tests.helpers.hf_models import hf_config


def test_round_trip(tmp_path: Path) -> None:
    config = hf_config("grouped_qk_norm_depth_3")
    config.save_pretrained(tmp_path)
    again = SGTConfig.from_pretrained(tmp_path)
    assert again.sgt_loops == config.sgt_loops == {
        "3": {"heads": [0, 3], "depth": 3}, "1": {"heads": [0, 1, 2], "depth": 1},
    }  # fmt: skip
    assert (again.head_dim, again.num_key_value_heads, again.qk_norm) == (12, 2, True)


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
