"""The record of the attention; against what is built, its numbers are tested by those who add them up."""

import pytest

from megatron_sgt.arch.attention import CAUSAL
from megatron_sgt.arch.kernels import CPU, GPU
from megatron_sgt.model.spec import ATTENTIONS
from tests.helpers.single import small_config

TOKENS, SIZE = 10, 16


def saved(heads: int, groups: int, element: int = 4, **changes: bool) -> int:
    model = small_config(model={"num_query_groups": groups}).model
    kernels = GPU if changes.pop("reads_groups", False) else CPU
    return CAUSAL.saved_bytes(model, 0, heads, groups, TOKENS, element, kernels, **changes)


def test_operations_are_those_of_its_weights() -> None:
    model = small_config(model={"num_query_groups": 2}).model
    matrices = sum(weight.elements for weight in CAUSAL.weights(model, 0) if weight.decays)
    flops = CAUSAL.flops(model, 0, 3, model.num_attention_heads, model.num_query_groups, entropy=True)
    assert flops.linear == 2 * 3 * model.seq_length * matrices
    assert flops.attention == 4 * 3 * 4 * model.seq_length**2 * SIZE
    assert flops.entropy == 2 * 3 * 4 * model.seq_length * SIZE
    assert CAUSAL.module in ATTENTIONS


@pytest.mark.parametrize(
    ("heads", "groups", "options", "blocks"),
    [
        # Query, output and key beside the fused projection, of which values are a view.
        (4, 4, {}, 4 + 4 + 4 + 12),
        # Grouped keys and values are repeated, and the fused projection is let go.
        (4, 2, {}, 4 + 4 + 2 * 4),
        (4, 2, {"recomputed": True}, 4 + 4 + 2 + 8),
        (4, 2, {"indexed": True}, 4 + 4 + 2 * 4),
        (4, 2, {"indexed": True, "recomputed": True}, 4 + 4 + 2 * 4),
    ],
)
def test_saved_bytes(heads: int, groups: int, options: dict[str, bool], blocks: int) -> None:
    statistics = 0 if options.get("recomputed") else 4 * heads * TOKENS
    assert saved(heads, groups, **options) == blocks * TOKENS * SIZE * 4 + statistics


def test_kernels_that_read_groups_do_so_in_16_bits() -> None:
    statistics = 4 * 4 * TOKENS
    assert saved(4, 2, 2, reads_groups=True) == (4 + 4 + 2 + 8) * TOKENS * SIZE * 2 + statistics
    assert saved(4, 2, 4, reads_groups=True) == saved(4, 2, 4)


def test_head_norms() -> None:
    """One fp32 statistic per head and token, and a normalised copy where kernels are composed."""
    model = small_config(model={"qk_layernorm": True}).model
    for kernels, copies in ((CPU, 1), (GPU, 0)):
        found = CAUSAL.head_norm_bytes(model, 0, 8, TOKENS, 2, kernels)
        assert found == TOKENS * 8 * (copies * SIZE * 2 + 4)
    assert CAUSAL.head_norm_bytes(small_config().model, 0, 8, TOKENS, 2, CPU) == 0


def test_fields_of_an_exported_model() -> None:
    model = small_config(model={"qk_layernorm": True, "add_qkv_bias": True}).model
    assert CAUSAL.hf_fields(model) == {"qk_norm": True, "attention_bias": True, "attention_out_bias": False}
