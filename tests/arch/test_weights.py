"""The table of weights against the model that is built: names, shapes and what each weight is."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.arch.weights import layer_weights, weights
from megatron_sgt.config import Config
from megatron_sgt.engine.build import start_processes
from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.gpt import build_model
from megatron_sgt.optim.param_groups import parameter_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import single_model, small_config
from tests.helpers.variants import MODEL_VARIANTS

VARIANTS: dict[str, dict[str, Any]] = {
    **MODEL_VARIANTS,
    "gelu": {"activation": "gelu", "normalization": "LayerNorm", "add_bias_linear": True, "vocab_size": 101},
}


def table_config(variant: str, tp_size: int = 1) -> Config:
    return small_config(model=VARIANTS[variant], parallel={"device": "cpu", "tensor_model_parallel_size": tp_size})


def built(info: RankInfo, variants: list[str]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of this rank's parameters, by name."""
    found = []
    for variant in variants:
        config = table_config(variant, info.world_size)
        model = build_model(config, start_processes(config, info), "fp32", 1)
        found.append({name: tuple(p.shape) for name, p in model.gpt.named_parameters()})
    return found


@pytest.mark.parametrize("tp_size", [1, 2])
def test_every_parameter_of_the_built_model_is_in_the_table(tp_size: int) -> None:
    variants = [v for v in VARIANTS if table_config(v).model.num_query_groups % tp_size == 0]
    for shapes in run_on_ranks(tp_size, built, variants):
        for variant, found in zip(variants, shapes, strict=True):
            table = weights(table_config(variant).model)
            assert {w.megatron: w.shard_shape(tp_size) for w in table} == found, variant
            assert len({name for w in table for name in w.hf}) == sum(len(w.hf) for w in table)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kinds(variant: str) -> None:
    """What decays is what the optimizer lets decay; the names say what the others are."""
    config = table_config(variant)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"weight_decay_on": "matrices"})})
    model = single_model(config)
    decaying = {id(p) for p in parameter_groups(model, config.optim)[0]["params"]}
    for weight in weights(config.model):
        assert weight.decays == (id(model.gpt.get_parameter(weight.megatron)) in decaying)
        assert (weight.kind == "bias") == weight.megatron.endswith(".bias")
        assert (weight.kind == "residual") == (weight.split == "columns")


def test_layers_differ_in_their_number_alone() -> None:
    model = table_config("biases").model
    first, last = layer_weights(model, 0), layer_weights(model, 3)
    assert [w.megatron.replace("layers.0.", "layers.3.") for w in first] == [w.megatron for w in last]
    assert [(w.shapes, w.split, w.kind, w.part) for w in first] == [(w.shapes, w.split, w.kind, w.part) for w in last]


def test_the_order_of_the_files_stays() -> None:
    """Exported and resharded files hold tensors in the order of the table."""
    names = [w.megatron.split(".", 3)[3] for w in layer_weights(table_config("biases").model, 0)]
    assert names == [
        "input_layernorm.weight", "self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias",
        "self_attention.linear_proj.weight", "pre_mlp_layernorm.weight", "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight", "self_attention.linear_proj.bias", "mlp.linear_fc1.bias", "mlp.linear_fc2.bias",
    ]  # fmt: skip


def test_without_a_vocabulary_there_is_no_table() -> None:
    model = table_config("multi_head").model.model_copy(update={"vocab_size": None})
    with pytest.raises(ConfigError, match=r"model\.vocab_size: is null"):
        weights(model)
