"""New trajectories in the golden format: complete, reproducible, and far from any tie."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from tests.helpers.trajectories import (
    GOLDEN,
    VARIANTS,
    decision_margin,
    make_trajectory,
    read_trajectory,
    settings_of,
    write_trajectory,
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_is_a_complete_trajectory(variant: str, tmp_path: Path) -> None:
    settings = settings_of(variant)
    tensors, metadata = make_trajectory(settings, seed=0)
    golden, golden_metadata = read_trajectory(GOLDEN)
    outside_layers = {key for key in golden if ".layers." not in key}
    if not settings["model"].get("untie_embeddings_and_output_weights", True):
        outside_layers -= {"init/lm_head.weight", "final/lm_head.weight"}
    assert {key for key in tensors if ".layers." not in key} == outside_layers
    for key in outside_layers:
        assert tensors[key].dtype == golden[key].dtype and tensors[key].dim() == golden[key].dim(), key
    assert set(metadata) == set(golden_metadata)
    assert tensors["loss"][-1] < tensors["loss"][0] - 0.1
    write_trajectory(tmp_path / "t.safetensors", tensors, metadata)
    again, metadata_again = read_trajectory(tmp_path / "t.safetensors")
    assert metadata_again == metadata
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)


def test_the_same_seed_makes_the_same_trajectory() -> None:
    settings = settings_of("stopped_inside_a_window")
    unchanged = deepcopy(settings)
    first, second, other = (make_trajectory(settings, seed)[0] for seed in (0, 0, 1))
    assert settings == unchanged
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["tokens"], other["tokens"])
    assert not torch.equal(first["loss"], other["loss"])


@pytest.fixture
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
def test_micro_batches_do_not_change_the_run() -> None:
    """In float64: in fp32 the order of sums moves a gradient norm by 7e-6 or 2e-5, as the processor's vectors are."""
    settings = settings_of("depth2_cosine")
    whole, metadata = make_trajectory({**settings, "micro_batch": 4}, seed=0)
    split, split_metadata = make_trajectory({**settings, "micro_batch": 1}, seed=0)
    assert split_metadata["events"] == metadata["events"]
    for key in ("loss", "ema_entropy", "grad_norm"):
        assert (whole[key] - split[key]).abs().max() < 1e-12, key


def test_events_of_the_variants_differ_where_they_should() -> None:
    def actions(variant: str) -> list[str]:
        return [event["action"] for event in make_trajectory(settings_of(variant), seed=0)[1]["events"]]

    assert actions("depth3_exponential").count("increase_depth") == 6
    assert actions("vanilla") == actions("block_loop") == []
    assert actions("stopped_inside_a_window") == ["first_selection", "increase_depth"]


def test_entropy_goes_on_after_fixed_only_where_asked() -> None:
    watched = make_trajectory(settings_of("entropy_after_fixed"), seed=0)[0]["ema_entropy"]
    ended = make_trajectory(settings_of("depth2_cosine"), seed=0)[0]["ema_entropy"]
    assert not torch.equal(watched[-1], watched[-2])
    assert torch.equal(ended[-1], ended[-2])


def test_a_decision_on_the_edge_is_refused() -> None:
    settings = settings_of("shallow_to_deep")
    with pytest.raises(ValueError, match="a decision hangs on"):
        make_trajectory(settings, seed=0, min_margin=0.5)


def test_golden_decisions_are_clear_of_noise() -> None:
    golden, metadata = read_trajectory(GOLDEN)
    assert decision_margin(golden["ema_entropy"], metadata) > 1e-4
