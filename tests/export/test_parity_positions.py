"""Positions far beyond any probe: the exported decoder's against the project's."""

from __future__ import annotations

import pytest

from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from megatron_sgt.export.hf.modeling_sgt import SGTModel
from megatron_sgt.export.parity_positions import TOLERANCE, probe_positions, rotary_gap
from tests.helpers.single import single_model, small_config

YARN = {"factor": 8.0, "original_max_position_embeddings": 8192}
CONFIG = small_config(model={"rotary_scaling": {"type": "yarn", **YARN, "context_length": 65536}})


def test_positions_reach_the_whole_context() -> None:
    positions = probe_positions(CONFIG.model)
    assert {0, 1, 31, 32, 8191, 8192, 65535, 65536, 131072} <= set(positions) and len(positions) < 20
    assert probe_positions(small_config().model) == []


@pytest.mark.parametrize(
    ("changes", "equal"), [({}, True), ({"attention_factor": 1.2}, False), ({"factor": 8.1}, False)]
)
def test_another_scaling_is_caught(changes: dict[str, float], equal: bool) -> None:
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8}
    rope = {"rope_type": "yarn", "rope_theta": 1e4, **YARN, **changes}
    theirs = SGTModel(SGTConfig(**shape, rope_parameters=rope))
    gap = rotary_gap(single_model(CONFIG), theirs, probe_positions(CONFIG.model))
    assert (gap <= TOLERANCE) is equal
