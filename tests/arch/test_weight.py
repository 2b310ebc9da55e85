import math

import pytest

from megatron_sgt.arch.weight import Shape, Split, linear, norm


@pytest.mark.parametrize(
    ("split", "shapes", "whole", "half"),
    [
        ("rows", [(8, 6)], (8, 6), (4, 6)),
        ("rows", [(8, 6), (8, 6)], (16, 6), (8, 6)),
        ("qkv", [(8, 6), (4, 6), (4, 6)], (16, 6), (8, 6)),
        ("vocab", [(10, 6)], (10, 6), (5, 6)),
        ("columns", [(6, 8)], (6, 8), (6, 4)),
    ],
)
def test_shapes_of_shards(split: Split, shapes: list[Shape], whole: Shape, half: Shape) -> None:
    """A bias is split as the rows of its matrix are; behind a matrix split by columns every rank has all of it."""
    hf = {f"part{n}": shape for n, shape in enumerate(shapes)}
    matrix, bias = linear("module", hf, split, "mlp", bias=True)
    assert (matrix.shard_shape(1), matrix.shard_shape(2)) == (whole, half)
    assert (matrix.elements, matrix.on_rank(2)) == (math.prod(whole), math.prod(half))
    assert matrix.whole == {f"{name}.weight": shape for name, shape in hf.items()}
    assert bias.shard_shape(2) == (whole[:1] if split == "columns" else half[:1])
    assert bias.hf == tuple(f"{name}.bias" for name in hf)


def test_norms_are_replicated() -> None:
    weight, bias = norm("module", "hf", 6, bias=True)
    assert weight.shard_shape(4) == bias.shard_shape(4) == (6,)
    assert (weight.megatron, bias.hf, weight.kind, bias.kind) == (
        "module.weight",
        ("hf.bias",),
        "norm",
        "bias",
    )
    assert not weight.decays and not bias.decays
