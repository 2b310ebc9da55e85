from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint.reshard.rank_state import QUANTITIES, WEIGHTS
from megatron_sgt.checkpoint.reshard.stage3 import Stage3State
from megatron_sgt.errors import CheckpointError
from tests.helpers.deepspeed_files import (
    STEP,
    State,
    groups_of,
    odd_config,
    random_state,
    rank_state,
    write_stage3,
)


@pytest.fixture
def state() -> State:
    config = odd_config()
    return rank_state(config, random_state(config))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 5])
@pytest.mark.parametrize("groups", ["one", "two", "many"])
def test_reads_what_was_written(groups: str, dp_size: int, state: State, tmp_path: Path) -> None:
    names = list(state[WEIGHTS])
    parameters = {
        "one": [names],
        "two": groups_of(names, state, "matrices"),
        "many": [names[start : start + 3] for start in range(0, len(names), 3)],  # a small sub_group_size
    }[groups]
    files = [tmp_path / f"optimizer{rank}.pt" for rank in range(dp_size)]
    write_stage3(tmp_path / "model.pt", lambda rank: files[rank], state, parameters, dp_size)
    read = Stage3State(tmp_path / "model.pt", files)
    assert (read.step, read.loss_scale) == (STEP, None)
    assert read.shapes == {name: tuple(tensor.shape) for name, tensor in state[WEIGHTS].items()}
    for quantity in QUANTITIES:
        for name, tensor in state[quantity].items():
            found = read.read(name, quantity)
            assert torch.equal(found, tensor) and not found.requires_grad, (quantity, name)


def test_states_on_nvme_are_refused(state: State, tmp_path: Path) -> None:
    def offloaded(content: dict[str, Any]) -> None:
        content["fp32_flat_groups"] = [torch.zeros(0)]

    files = [tmp_path / "optimizer.pt"]
    write_stage3(tmp_path / "model.pt", lambda rank: files[rank], state, [list(state[WEIGHTS])], 1, offloaded)
    with pytest.raises(CheckpointError, match=r"optimizer\.pt: sub-group 0 has 0 elements.*NVMe"):
        Stage3State(tmp_path / "model.pt", files)
