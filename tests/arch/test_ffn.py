"""The built-in kinds of feed-forward layers. A kind of somebody else's: ``test_third_ffn.py``."""

import pytest

from megatron_sgt.arch.ffn import KINDS, all_kinds, ffn_kind, kind_of_hf
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.model.mlp import FFN_MODULES
from tests.helpers.single import small_config


@pytest.mark.parametrize("name", KINDS)
def test_a_record_agrees_with_itself_and_with_its_module(name: str) -> None:
    kind, model = ffn_kind(name), small_config(model={"activation": name}).model
    matrices = sum(weight.elements for weight in kind.weights(model, 0) if weight.decays)
    assert kind.flops(model, 0, tokens=7).forward == 2 * 7 * matrices
    assert FFN_MODULES[kind.module].gated == kind.gated
    assert kind.hidden_act is not None and kind_of_hf(kind.gated, kind.hidden_act) == name


def test_a_configuration_accepts_exactly_the_kinds_that_there_are() -> None:
    assert all_kinds() == KINDS
    known = " or ".join(map(repr, KINDS))
    with pytest.raises(ValueError, match=f"should be {known}"):
        ModelConfig.model_validate({**dict(small_config().model), "activation": "relu"})
    with pytest.raises(ConfigError, match=r"'relu' of megatron_sgt\.ffn is not registered"):
        ffn_kind("relu")
    assert kind_of_hf(True, "gelu") is None
