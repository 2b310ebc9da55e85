"""Reading, translating, comparing and writing trajectories. Whole ones: tests/golden/test_trajectory.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from trajectory_parts import run as rp

from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.ranks import run_on_ranks
from tests.helpers.trajectories import GOLDEN, init_weights, settings_of


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, Tensor], dict[str, Any]]:
    return rp.read_trajectory(GOLDEN)


def config_of(variant: str, **overrides: dict[str, Any]) -> Any:
    settings = settings_of(variant)
    weights = {f"init/{name}": w for name, w in init_weights(settings["model"], 0).items()}
    return rp.trajectory_config(weights, settings, overrides)


def test_settings_of_the_golden_file(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, meta = golden
    config = rp.trajectory_config(tensors, meta, {})
    model = config.model
    assert (model.num_layers, model.num_attention_heads, model.num_query_groups, model.kv_channels) == (
        6,
        4,
        4,
        16,
    )
    assert model.padded_vocab_size() == model.vocab_size == 256
    assert (config.growth.window_size, config.growth.exclude_layers) == (10, (0,))
    assert (config.optim.lr, config.optim.adam_beta2, config.optim.lr_decay_style) == (3e-3, 0.95, "constant")
    assert (config.train.train_iters, config.train.global_batch_size, config.train.precision) == (
        60,
        8,
        "fp32",
    )


def test_what_the_weights_imply() -> None:
    model = config_of("grouped_query_qk_norm").model
    assert (model.num_query_groups, model.qk_layernorm) == (2, True)
    model = config_of("wide_heads_tied").model
    assert (model.kv_channels, model.untie_embeddings_and_output_weights) == (16, False)
    assert config_of("depth3_exponential").growth.max_loop_depth == 3
    assert config_of("block_loop").growth.block_loop_layers == (2, 3)


def test_overrides_and_what_they_break() -> None:
    config = config_of("vanilla", parallel={"tensor_model_parallel_size": 2}, train={"micro_batch_size": 1})
    assert (config.parallel.tensor_model_parallel_size, config.train.micro_batch_size) == (2, 1)
    with pytest.raises(ConfigError, match=r"the trajectory's metadata[\s\S]*num_attention_heads: 4 is not a multiple"):
        config_of("vanilla", parallel={"tensor_model_parallel_size": 3})


def test_more_top_layers_than_there_are_means_all() -> None:
    settings = settings_of("lowest_heads")
    settings["growth"]["top_k_layers"] = 9
    weights = {f"init/{name}": w for name, w in init_weights(settings["model"], 0).items()}
    assert rp.trajectory_config(weights, settings, {}).growth.top_k_layers == 4


def test_what_cannot_be_replayed_is_refused(golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, meta = golden
    other = copy.deepcopy(meta)
    other["optim"]["schedule"] = "cosine"
    with pytest.raises(DataError, match="'cosine' is not supported"):
        rp.trajectory_config(tensors, other, {})
    with pytest.raises(DataError, match=r"lacks the initial weight .*q_proj"):
        rp.trajectory_config({}, meta, {})


def test_files_that_are_no_trajectories(tmp_path: Path) -> None:
    text, bare = tmp_path / "text.safetensors", tmp_path / "bare.safetensors"
    text.write_text("not tensors")
    save_file({"x": torch.zeros(1)}, bare)
    for path in (text, bare, tmp_path / "missing.safetensors"):
        with pytest.raises(DataError, match=f"{path.name} is not a trajectory file"):
            rp.read_trajectory(path)


def test_round_trip(tmp_path: Path, golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    path = tmp_path / "new" / "t.safetensors"
    rp.write_trajectory(path, *golden)
    tensors, meta = rp.read_trajectory(path)
    assert meta == golden[1] and tensors.keys() == golden[0].keys()
    assert all(torch.equal(tensors[name], golden[0][name]) for name in tensors)


BEYOND = {
    "loss": 4e-5,
    "ema_entropy": 4e-5,
    "head_decay": 2e-5,
    "final/model.norm.weight": 6e-4,
    "probe_logits": 2e-3,
}


@pytest.mark.parametrize("name", BEYOND)
def test_compare_finds_a_number_beyond_its_tolerance(
    name: str, golden: tuple[dict[str, Tensor], dict[str, Any]]
) -> None:
    tensors, meta = golden
    shown = "final weights" if name.startswith("final/") else name
    for change, found in ((BEYOND[name], True), (BEYOND[name] / 4, False), (float("nan"), True)):
        moved = {**tensors, name: tensors[name].clone()}
        moved[name].view(-1)[-1] += change
        differences, problems = rp.compare(moved, meta, tensors, meta)
        assert [p.startswith(f"{shown} differs by") for p in problems] == [True] * found
        if found and change == change:
            assert differences[shown] == pytest.approx(change, rel=1e-2)


@pytest.mark.parametrize(
    ("field", "value"), [("step", 11), ("layer", 4), ("phase", "fixed"), ("kept_heads", {"3": [0, 2]})]
)
def test_compare_finds_another_event(field: str, value: Any, golden: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    tensors, meta = golden
    assert rp.compare(tensors, meta, tensors, meta)[1] == []
    other = copy.deepcopy(meta)
    other["events"][0][field] = value
    [problem] = rp.compare(tensors, other, tensors, meta)[1]
    assert problem.startswith("events differ")
    deeper = {**tensors, "loop_depth": tensors["loop_depth"] + 1}
    assert rp.compare(deeper, meta, tensors, meta)[1] == ["loop_depth differs"]


def gathered(info: RankInfo, variant: str) -> float:
    """Largest difference between given weights and what a sharded model made of them gives back."""
    config = config_of(variant, parallel={"tensor_model_parallel_size": 2, "device": "cpu"})
    groups = start_processes(config, info)
    given = init_weights(settings_of(variant)["model"], 0)
    back = rp.gather_hf_weights(build_runtime(config, groups, weights=given), config)
    assert back.keys() == given.keys()
    return max(float((back[name] - given[name]).abs().max()) for name in given)


@pytest.mark.parametrize("variant", ["grouped_query_qk_norm", "wide_heads_tied"])
def test_weights_gathered_from_ranks_are_the_given_ones(variant: str) -> None:
    assert run_on_ranks(2, gathered, variant) == [0.0, 0.0]
