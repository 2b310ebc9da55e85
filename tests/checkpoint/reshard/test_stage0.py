from pathlib import Path

import pytest
import torch

from megatron_sgt.checkpoint.reshard.rank_state import QUANTITIES, WEIGHTS
from megatron_sgt.checkpoint.reshard.stage0 import Stage0State
from megatron_sgt.errors import CheckpointError
from tests.helpers.deepspeed_files import STEP, groups_of, odd_config, random_state, rank_state, write_stage0


@pytest.mark.parametrize("weight_decay_on", ["all", "matrices"])
def test_reads_what_was_written(weight_decay_on: str, tmp_path: Path) -> None:
    config = odd_config()
    state = rank_state(config, random_state(config))
    groups = groups_of(list(state[WEIGHTS]), state, weight_decay_on)
    write_stage0(tmp_path / "model.pt", state, groups)
    read = Stage0State(tmp_path / "model.pt")
    assert (read.step, read.loss_scale) == (STEP, None)
    assert read.shapes == {name: tuple(tensor.shape) for name, tensor in state[WEIGHTS].items()}
    for quantity in QUANTITIES:
        for name, tensor in state[quantity].items():
            assert torch.equal(read.read(name, quantity), tensor), (quantity, name)


def test_fp16_is_refused(tmp_path: Path) -> None:
    torch.save({"module": {}, "optimizer": {"fp32_groups": []}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="stage 0 with fp16"):
        Stage0State(tmp_path / "model.pt")
