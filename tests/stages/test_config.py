"""The configuration of a run whose model has grown: every layer that it names, and what it refuses."""

from __future__ import annotations

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.config import grown_config
from megatron_sgt.stages.operators import OPERATORS
from tests.helpers.single import small_config


def test_all_copies_of_a_named_layer_are_named() -> None:
    config = small_config(
        growth={"exclude_layers": [0, 2], "top_k_layers": 2},
        train={"recompute_layers": [1, 3], "recompute_granularity": "full"},
    )
    new = grown_config(config, OPERATORS["midas"](config.model, {"block_size": 2}), 5)
    assert new.model.num_layers == 6 and new.growth.exclude_layers == (0, 2, 4)
    assert new.train.recompute_layers == (1, 3, 5)
    loops = small_config(growth={"method": "block_loop", "block_loop_layers": [3]})
    new = grown_config(loops, OPERATORS["g_stack"](loops.model, {"factor": 3}), 5)
    assert new.growth.block_loop_layers == (3, 7, 11) and new.train == loops.train


def test_a_grown_model_must_fit_the_run() -> None:
    config = small_config(parallel={"tensor_model_parallel_size": 2})
    with pytest.raises(
        ConfigError,
        match=r"the grown model: 2 problems; model\.num_attention_heads: 5 is not a multiple .*; model\.num_q",
    ):
        grown_config(config, OPERATORS["msg"](config.model, {"num_attention_heads": 5, "num_query_groups": 5}), 5)
