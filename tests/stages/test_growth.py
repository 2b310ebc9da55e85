"""Which layer becomes which, by the methods that copy layers; what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.growth import WIDTHS, resized
from megatron_sgt.stages.operators import OPERATORS
from tests.architecture.source_tree import python_sources
from tests.architecture.test_layers import torch_imports
from tests.helpers.growing import shape
from tests.helpers.reference_growth import midas


def layers(name: str, depth: int, **options: Any) -> list[int]:
    return list(OPERATORS[name](shape(num_layers=depth), options).layers)


@pytest.mark.parametrize("factor", [2, 4])
def test_g_stack_is_the_stack_again_and_again(factor: int) -> None:
    growth = OPERATORS["g_stack"](shape(), {"factor": factor})
    assert list(growth.layers) == [i % 3 for i in range(3 * factor)]
    assert [growth.layers.count(layer) for layer in range(3)] == [factor] * 3
    assert growth.heirs == tuple(range(3 * factor - 3, 3 * factor)), "the last copy"
    assert growth.new == resized(shape(), num_layers=3 * factor) and not growth.preserves


@pytest.mark.parametrize("block_size", [1, 4])
def test_midas_ends_with_the_known_lineage(block_size: int) -> None:
    blocks, copied, depth = ["b0"], [], block_size
    names = ["b0"] * block_size
    for _ in range(5):
        growth = OPERATORS["midas"](shape(num_layers=depth), {"block_size": block_size})
        twice = [layer for layer in range(depth) if growth.layers.count(layer) == 2]
        copied.append(twice[0] // block_size)
        blocks = midas(blocks)
        newest = f"b{len(blocks) - 1} <- {names[twice[0]].split()[0]}"
        old, names = names, [names[layer] for layer in growth.layers]
        first = growth.layers.index(twice[0]) + block_size  # the copy stands after its source
        names[first : first + block_size] = [newest] * block_size
        assert [names[heir] for heir in growth.heirs] == old, "a heir is the original"
        depth += block_size
    assert copied == [0, 0, 1, 1, 2]
    assert names[::block_size] == blocks == ["b0", "b2 <- b0", "b4 <- b2", "b5 <- b4", "b3 <- b2", "b1 <- b0"]


def test_grad_stack_copies_the_last_block_and_lidas_the_middle_layers() -> None:
    assert layers("grad_stack", 8, block_size=4) == [0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    assert layers("lidas", 8, block_size=4) == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    assert layers("lidas", 12, block_size=4) == [*range(10), 6, 7, 8, 9, 10, 11]
    assert layers("lidas", 4, block_size=4) == [0, 1, 2, 3, 0, 1, 2, 3], "there is no second block"
    assert layers("midas", 8, block_size=4) == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (6, 9, [0, 1, 2, 3, 3, 4, 4, 5, 5]),
        (12, 18, [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11]),
        (2, 4, [0, 0, 1, 1]),
        (4, 5, [0, 1, 2, 3, 3]),
    ],
)
def test_auto_prog_repeats_late_layers(old: int, new: int, expected: list[int]) -> None:
    assert layers("auto_prog", old, num_layers=new) == expected


def test_msg_keeps_old_units_first_and_new_layers_silent() -> None:
    growth = OPERATORS["msg"](shape(), {"num_layers": 7, "ffn_hidden_size": 22, "num_attention_heads": 6})
    assert growth.layers == (0, 1, 2, 0, 1, 2, 0) and growth.heirs == (0, 1, 2)
    assert growth.silent == {3, 4, 5, 6} and growth.preserves
    assert growth.widths["ffn_hidden_size"] == (*range(20), -1, -1)
    assert growth.heads == (0, 1, 2, 3, -1, -1) and growth.new.num_query_groups == 6
    assert growth.new.kv_channels == 6 and set(growth.widths) <= set(WIDTHS)


def test_heads_stay_with_their_keys_and_values() -> None:
    grouped = shape(num_query_groups=2)
    in_proportion = OPERATORS["msg"](grouped, {"num_attention_heads": 8})
    assert in_proportion.new.num_query_groups == 4 and in_proportion.heads == (0, 1, 2, 3, -1, -1, -1, -1)
    larger_groups = OPERATORS["msg"](grouped, {"num_attention_heads": 6, "num_query_groups": 2})
    assert larger_groups.heads == (0, 1, -1, 2, 3, -1), "head 2 reads the second group still"


@pytest.mark.parametrize(
    ("name", "model", "options", "message"),
    [
        ("midas", {}, {"block_size": 2}, "midas: num_layers 3 is no multiple of block_size 2"),
        ("grad_stack", {}, {}, "grad_stack: num_layers 3 is no multiple of block_size 4"),
        ("lidas", {}, {"block_size": 3}, "lidas: block_size 3 is odd"),
        ("g_stack", {}, {"factor": 1}, "g_stack: factor: must be > 1, got 1"),
        ("g_stack", {}, {"faktor": 2}, "unknown key 'faktor'"),
        ("auto_prog", {}, {"num_layers": 7}, "auto_prog: num_layers 7: from 3 layers a model grows to 4 to 6"),
        ("auto_prog", {}, {}, "auto_prog: num_layers: is required"),
        ("msg", {}, {}, "msg: num_layers: nothing grows"),
        ("msg", {}, {"num_layers": 3}, "msg: nothing grows: the model has these sizes"),
        ("msg", {}, {"hidden_size": 20}, "hidden_size 20: is below the 24"),
        ("msg", {"normalization": "LayerNorm"}, {"hidden_size": 30}, "grows under RMSNorm only"),
        ("msg", {"num_query_groups": 2}, {"num_attention_heads": 5}, "no multiple of the 2 that share"),
        ("msg", {"num_query_groups": 2}, {"num_query_groups": 4}, "leaves 1 of 2 query heads"),
        ("msg", {}, {"num_attention_heads": 6, "num_query_groups": 4}, "num_query_groups"),
        ("compound_grow", {}, {"noise": -1.0}, "compound_grow: noise: must be >= 0"),
    ],
)
def test_what_does_not_fit_is_named(name: str, model: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OPERATORS[name](shape(**model), options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_method_decides_is_pure() -> None:
    chosen = [s for s in python_sources("megatron_sgt/checkpoint/surgery") if s.path.endswith("state.py")]
    assert len(chosen) == 1 and torch_imports(chosen[0]) == []
