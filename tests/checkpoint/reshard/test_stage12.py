from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.reshard.rank_state import MOMENTS, QUANTITIES, WEIGHTS
from megatron_sgt.checkpoint.reshard.stage12 import Stage12State
from megatron_sgt.errors import CheckpointError
from tests.helpers.deepspeed_files import (
    STEP,
    State,
    groups_of,
    odd_config,
    random_state,
    rank_state,
    write_stage12,
)


def elastic(content: dict[str, Any]) -> None:
    """The form that zero_optimization.elastic_checkpoint gives."""
    states = content["base_optimizer_state"]["state"]
    lean = [weights.numel() for weights in content["single_partition_of_fp32_groups"]]
    content["base_optimizer_state"] = [
        {"step": state["step"], **{m: state[m][: lean[index]] for m in MOMENTS}} for index, state in states.items()
    ]


def apex(content: dict[str, Any]) -> None:
    """FusedAdam counts its steps in the group."""
    base = content["base_optimizer_state"]
    for state, group in zip(base["state"].values(), base["param_groups"], strict=True):
        group["step"] = int(state.pop("step"))


def elastic_apex(content: dict[str, Any]) -> None:
    elastic(content)
    for state in content["base_optimizer_state"]:
        content["base_optimizer_state_step"] = int(state.pop("step"))


def as_it_is(content: dict[str, Any]) -> None:
    """Nothing changed."""


@pytest.fixture
def state() -> State:
    config = odd_config()
    return rank_state(config, random_state(config))


def written(
    folder: Path, state: State, dp_size: int, weight_decay_on: str = "all", **options: Any
) -> tuple[Path, list[Path]]:
    groups = groups_of(list(state[WEIGHTS]), state, weight_decay_on)
    files = [folder / f"optimizer{rank}.pt" for rank in range(dp_size)]
    write_stage12(folder / "model.pt", lambda rank: files[rank], state, groups, dp_size, **options)
    return folder / "model.pt", files


def check(read: Stage12State, state: State) -> None:
    assert read.step == STEP
    assert read.shapes == {name: tuple(tensor.shape) for name, tensor in state[WEIGHTS].items()}
    for quantity in QUANTITIES:
        for name, tensor in state[quantity].items():
            found = read.read(name, quantity)
            assert torch.equal(found, tensor) and not found.requires_grad, (quantity, name)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5, 64])
@pytest.mark.parametrize("weight_decay_on", ["all", "matrices"])
def test_reads_what_was_written(weight_decay_on: str, dp_size: int, state: State, tmp_path: Path) -> None:
    check(Stage12State(*written(tmp_path, state, dp_size, weight_decay_on)), state)


@pytest.mark.parametrize("change", [as_it_is, elastic, apex, elastic_apex])
@pytest.mark.parametrize("aligned", [1, 4])
def test_other_forms(change: Callable[[dict[str, Any]], None], aligned: int, state: State, tmp_path: Path) -> None:
    check(Stage12State(*written(tmp_path, state, 3, "matrices", aligned=aligned, change=change)), state)


def test_a_group_that_fits_into_one_part(state: State, tmp_path: Path) -> None:
    tiny: State = {q: {"a": torch.randn(1), "b": torch.randn(2)} for q in QUANTITIES}
    check(Stage12State(*written(tmp_path, tiny, 4)), tiny)


def test_bf16_is_read_as_fp32(state: State, tmp_path: Path) -> None:
    def halve(content: dict[str, Any]) -> None:
        for values in content["base_optimizer_state"]["state"].values():
            values["exp_avg"] = values["exp_avg"].bfloat16()

    read = Stage12State(*written(tmp_path, state, 2, change=halve))
    name, tensor = next(iter(state["exp_avg"].items()))
    assert torch.equal(read.read(name, "exp_avg"), tensor.bfloat16().float())


def test_the_loss_scale_is_found(state: State, tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def scale(content: dict[str, Any]) -> None:
        content.update(dynamic_loss_scale=True, loss_scaler=DynamicLossScaler(128.0, 2.0, 10, 1.0, 1))

    assert Stage12State(*written(tmp_path, state, 2, change=scale)).loss_scale == 128.0


def test_lost_elements_are_noticed(state: State, tmp_path: Path) -> None:
    model, files = written(tmp_path, state, 4)
    read = Stage12State(model, files[:-1])
    last = list(state[WEIGHTS])[-1]
    with pytest.raises(CheckpointError, match=f"weights of {last} has .* elements, not"):
        read.read(last, WEIGHTS)


def test_a_rank_at_another_step_is_noticed(state: State, tmp_path: Path) -> None:
    model, files = written(tmp_path, state, 2)
    content = torch.load(files[1], weights_only=False)
    content["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] += 1
    torch.save(content, files[1])
    with pytest.raises(CheckpointError, match=rf"\[{STEP}, {STEP + 1}\]"):
        Stage12State(model, files)
