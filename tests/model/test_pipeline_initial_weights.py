"""Initial weights do not depend on the layout: pipeline stages, chunks, tensor parallelism, uneven cuts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import pytest
from megatron.core import parallel_state
from torch import Tensor

from megatron_sgt.engine.build import start_processes
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.gpt import build_model
from megatron_sgt.model.hf_weights import hf_weights
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import small_config

MODEL = {"num_layers": 8, "num_query_groups": 2, "qk_layernorm": True, "add_bias_linear": True}
TIED = {"untie_embeddings_and_output_weights": False}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2xVP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "PP2 uneven": (2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "5,3"}),
    "PP4 uneven": (4, {"pipeline_model_parallel_size": 4, "pipeline_model_parallel_layout": "1,3,3,1"}),
    "PP2xTP2": (4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "PP4xVP2": (4, {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2}),
    "PP2xVP2xDP2": (4, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
}
KINDS = [(tied, on_cpu) for tied in (False, True) for on_cpu in (True, False)]


def config_of(parallel: dict[str, Any], tied: bool, on_cpu: bool) -> Any:
    model = {**MODEL, **(TIED if tied else {}), "use_cpu_initialization": on_cpu}
    train = {"micro_batch_size": 1, "global_batch_size": 8}
    return small_config(model=model, parallel={"device": "cpu", **parallel}, train=train)


Place = tuple[int, int, int]


def drawn(info: RankInfo, layouts: list[dict[str, Any]]) -> list[list[tuple[Place, dict[str, Tensor]]]]:
    """Per layout and kind: this rank's (pp, dp, tp) and its parameters."""
    found = []
    for parallel in layouts:
        kinds = []
        for tied, on_cpu in KINDS:
            config = config_of(parallel, tied, on_cpu)
            groups = start_processes(config, info)
            model = build_model(config, groups, "fp32", 1)
            place = (groups.pp_rank, groups.dp_rank, groups.tp_rank)
            kinds.append((place, {name: p.detach().clone() for name, p in model.gpt.named_parameters()}))
        parallel_state.destroy_model_parallel()
        found.append(kinds)
    return found


def hashes(by_place: dict[Place, dict[str, Tensor]], tied: bool) -> dict[str, str]:
    """By global name, of whole tensors; every replica has them, and no name is on two stages."""
    shards: dict[tuple[int, int], dict[str, Tensor]] = {}
    for (_, replica, tp_rank), own in by_place.items():
        held = shards.setdefault((replica, tp_rank), {})
        assert not held.keys() & own.keys()
        held.update(own)
    models = []
    for replica in sorted({place[1] for place in by_place}):
        parts = [shards[key] for key in sorted(shards) if key[0] == replica]
        whole = hf_weights(parts, config_of({}, tied, True).model)
        models.append({name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in whole.items()})
    assert all(model == models[0] for model in models)
    return models[0]


@pytest.fixture(scope="module")
def weights() -> Mapping[str, list[dict[str, str]]]:
    """By layout: the hashes of each of KINDS."""
    found: dict[str, list[dict[str, str]]] = {}
    layouts = {"one rank": (1, {}), **LAYOUTS}
    for size in (1, 2, 4):
        names = [name for name, (ranks, _) in layouts.items() if ranks == size]
        by_rank = run_on_ranks(size, drawn, [layouts[name][1] for name in names])
        for number, name in enumerate(names):
            found[name] = [
                hashes(dict(rank[number][kind] for rank in by_rank), KINDS[kind][0]) for kind in range(len(KINDS))
            ]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_draws_the_same_model(weights: Any, layout: str) -> None:
    """Bit for bit, by global name, wherever weights are drawn."""
    for found, wanted in zip(weights[layout], weights["one rank"], strict=True):
        assert found == wanted


def test_no_two_matrices_are_equal(weights: Any) -> None:
    """Hashes of constants would be equal everywhere."""
    for model in weights["PP2xTP2"]:
        matrices = [text for name, text in model.items() if name.endswith("proj.weight")]
        assert len(matrices) == 7 * 8 == len({*matrices})
