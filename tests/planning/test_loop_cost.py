"""The cost model's bytes and FLOPs by hand, and the choice that follows."""

import pytest

from megatron_sgt.planning.loop_cost import choose_loop_method, loop_cost
from tests.helpers.single import small_config

MODEL = {
    "num_layers": 4,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "seq_length": 1024,
    "vocab_size": 128,
}


def config(tp: int, sequence_parallel: bool = True, **parallel: object):  # type: ignore[no-untyped-def]
    layout = {"tensor_model_parallel_size": tp, "sequence_parallel": sequence_parallel, **parallel}
    return small_config(model={**MODEL, "ffn_hidden_size": 8192}, parallel=layout)


def test_bytes_of_two_heads_of_32() -> None:
    """T = 1024, B = 2, D = 4096, H = 128, two bytes an element."""
    owner, balanced = (loop_cost(config(4), method, (0, 1)) for method in ("owner", "balanced"))
    assert owner.bytes_forward == owner.bytes_backward == 2 * 2048 * 4096 * 2
    assert balanced.bytes_forward == balanced.bytes_backward == 2 * 2048 * 2 * 128 * 2
    assert owner.bytes_forward == 16 * balanced.bytes_forward


def test_bytes_without_sequence_parallelism() -> None:
    balanced = loop_cost(config(4, sequence_parallel=False), "balanced", (0, 1))
    assert balanced.bytes_forward == (2 + 1) * 2048 * 2 * 128 * 2
    assert balanced.bytes_backward == (2 + 3) * 2048 * 2 * 128 * 2


def test_flops_of_the_busiest_rank() -> None:
    """Both heads on one rank: the owner does everything, balanced a quarter of it and 7/16 of the triangle."""
    projections, attention = 2 * 2048 * 4096 * 8 * 128, 4 * 2048 * 1024 * 2 * 128
    owner, balanced = (loop_cost(config(4), method, (0, 1)) for method in ("owner", "balanced"))
    assert owner.flops == projections + attention // 2
    assert balanced.flops == projections // 4 + round(attention / 2 * 7 / 16)
    assert balanced.seconds < owner.seconds


def test_heads_that_are_spread_cost_their_owners_less() -> None:
    together, spread = (loop_cost(config(4), "owner", heads) for heads in ((0, 1), (0, 31)))
    assert together.flops == 2 * spread.flops


@pytest.mark.parametrize(
    ("tp", "extra", "method", "reason"),
    [
        (1, {"sequence_parallel": False}, "owner", "one tensor-parallel rank"),
        (4, {}, "balanced", "balanced looping over 4"),
        (4, {"loop_method": "owner"}, "owner", "parallel.loop_method"),
    ],
)
def test_choice(tp: int, extra: dict[str, object], method: str, reason: str) -> None:
    chosen, why = choose_loop_method(config(tp, **extra))
    assert chosen == method
    assert reason in why


def test_what_balanced_looping_cannot_do_is_left_to_the_owner() -> None:
    odd = small_config(model={"seq_length": 31}, parallel={"tensor_model_parallel_size": 2})
    assert choose_loop_method(odd)[0] == "owner"
    dropout = small_config(model={"attention_dropout": 0.1}, parallel={"tensor_model_parallel_size": 2})
    assert choose_loop_method(dropout)[0] == "owner"
