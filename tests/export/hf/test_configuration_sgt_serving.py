"""Passes are what a runtime counts as layers; their number follows from the layers and their loops."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sgt.export.hf.configuration_sgt_serving import SGTServingConfig
from megatron_sgt.export.hf.modeling_sgt_serving import SGTServingModel
from tests.helpers.hf_models import SHAPE

LOOPS = {"1": {"heads": [0, 2], "depth": 2}, "3": {"block_loops": 1}}


def test_passes_are_counted_and_kept(tmp_path: Path) -> None:
    shape = {name: value for name, value in SHAPE.items() if name != "num_hidden_layers"}
    config = SGTServingConfig(sgt_num_layers=4, sgt_loops=LOOPS, **shape)
    assert (config.sgt_num_layers, config.num_hidden_layers) == (4, 7)
    config.save_pretrained(tmp_path)
    again = SGTServingConfig.from_pretrained(tmp_path)
    assert (again.sgt_num_layers, again.num_hidden_layers, again.sgt_loops) == (4, 7, config.sgt_loops)
    assert SGTServingConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_a_number_of_passes_that_is_not_theirs_is_refused() -> None:
    with pytest.raises(ValueError, match="num_hidden_layers 4: 4 layers with these sgt_loops have 7 attention passes"):
        SGTServingConfig(sgt_num_layers=4, num_hidden_layers=4, sgt_loops=LOOPS)
    with pytest.raises(ValueError, match="layer 3 of a model with 2 layers"):
        SGTServingConfig(sgt_num_layers=2, sgt_loops=LOOPS)
    config = SGTServingConfig(sgt_num_layers=4, sgt_loops=LOOPS)
    config.num_hidden_layers = 5  # as a runtime's override would
    with pytest.raises(ValueError, match="num_hidden_layers 5"):
        SGTServingModel(config)
