from types import SimpleNamespace

import pytest
import torch

from megatron_sgt.checkpoint.reshard.rank_state import common_step, dynamic_scale
from megatron_sgt.errors import CheckpointError


def test_common_step() -> None:
    assert common_step([torch.tensor(5.0), 5], "here") == 5
    with pytest.raises(CheckpointError, match="here holds no optimizer state"):
        common_step([], "here")
    with pytest.raises(CheckpointError, match=r"here: parameters differ in their AdamW step \(\[4, 5\]\)"):
        common_step([torch.tensor(5.0), 4], "here")


def test_only_a_dynamic_loss_scale_is_kept() -> None:
    scaler = SimpleNamespace(cur_scale=256)
    assert dynamic_scale({"dynamic_loss_scale": True, "loss_scaler": scaler}) == 256.0
    assert dynamic_scale({"dynamic_loss_scale": False, "loss_scaler": scaler}) is None
