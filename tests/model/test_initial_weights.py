"""Initial weights: the same model under every tensor-parallel size, wherever and by whomever it is drawn."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.engine.build import start_processes
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.gpt import build_model
from megatron_sgt.model.hf_weights import hf_weights
from tests.helpers.cuda_tracker import TRACKERS, tracker
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import single_model, small_config
from tests.helpers.variants import hf_of

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries, q/k norm, biases": {
        "num_attention_heads": 8, "num_query_groups": 4, "qk_layernorm": True, "add_bias_linear": True,
    },
    "tied, padded vocabulary, GELU, LayerNorm": {
        "vocab_size": 100, "untie_embeddings_and_output_weights": False, "activation": "gelu",
        "normalization": "LayerNorm",
    },
}  # fmt: skip
CASES = [(shape, on_cpu, name) for shape in SHAPES for on_cpu in (False, True) for name in TRACKERS]

Shard = dict[str, Tensor]


def shards(info: RankInfo, tp_size: int) -> list[Shard]:
    """This rank's initial parameters in every case."""
    drawn = []
    for shape, on_cpu, name in CASES:
        config = small_config(
            model={**SHAPES[shape], "use_cpu_initialization": on_cpu},
            parallel={"tensor_model_parallel_size": tp_size},
        )
        groups = start_processes(config, info)
        with tracker(name):
            model = build_model(config, groups, "fp32", 1)
        drawn.append({name: p.detach() for name, p in model.gpt.named_parameters()})
    return drawn


@pytest.fixture(scope="module")
def whole() -> Mapping[int, list[Shard]]:
    """By tensor-parallel size: the whole model of each case, under Hugging Face names."""
    models = {}
    for tp_size in (1, 2, 4):
        by_rank = run_on_ranks(tp_size, shards, tp_size)
        models[tp_size] = [
            hf_weights([rank[n] for rank in by_rank], small_config(model=SHAPES[shape]).model)
            for n, (shape, _, _) in enumerate(CASES)
        ]
    return models


@pytest.mark.parametrize("tp_size", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_layout_does_not_matter(whole: Mapping[int, list[Shard]], tp_size: int, case: Any) -> None:
    """Bit for bit; nor does it matter what Megatron-Core draws from, or where it puts weights first."""
    shape = case[0]
    wanted, found = whole[1][CASES.index((shape, True, TRACKERS[0]))], whole[tp_size][CASES.index(case)]
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("shape", SHAPES)
def test_no_two_parts_of_a_matrix_are_equal(whole: Mapping[int, list[Shard]], shape: str) -> None:
    """A rank's share that equals another rank's stays equal to it for ever."""
    model = whole[2][CASES.index((shape, False, "Megatron's"))]
    matrices = [(name, tensor) for name, tensor in model.items() if tensor.dim() == 2]
    assert len(matrices) > 20
    for name, tensor in matrices:
        for dim in (0, 1):
            first, second = tensor[: len(tensor) // 2 * 2].chunk(2, dim=dim)
            assert not torch.equal(first, second), name
    values = torch.cat([tensor.flatten()[:64] for _, tensor in matrices])
    assert len(values.unique()) > 0.99 * len(values), "streams of two tensors overlap"


def test_distributions() -> None:
    config = small_config(model={"hidden_size": 128, "init_method_std": 0.1, "add_bias_linear": True})
    for name, tensor in hf_of(single_model(config), config).items():
        if tensor.dim() == 1:
            assert tensor.unique().tolist() == [0.0 if name.endswith("bias") else 1.0], name
            continue
        residual = any(part in name for part in ("o_proj", "down_proj"))
        std = 0.1 / math.sqrt(2 * 4) if residual else 0.1
        assert tensor.std().item() == pytest.approx(std, rel=0.03), name
        assert abs(tensor.mean().item()) < 4 * std / math.sqrt(tensor.numel()), name


def test_other_streams_are_left_alone() -> None:
    config = small_config()
    torch.manual_seed(3)
    single_model(config)
    first = torch.rand(4)
    single_model(config.model_copy(update={"model": config.model.model_copy(update={"init_method_std": 1.0})}))
    assert torch.equal(torch.rand(4), first)
