from pathlib import Path

import pytest
import torch

from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.checkpoint.reshard.layout_free import LayoutFreeReader, file_name, is_layout_free
from megatron_sgt.checkpoint.reshard.rank_state import QUANTITIES
from megatron_sgt.errors import CheckpointError
from tests.helpers.deepspeed_files import odd_config, random_state, rank_state, write_checkpoint


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_every_rank_gets_its_shard(tp_size: int, tmp_path: Path) -> None:
    config = odd_config()
    state = random_state(config)
    final, *_ = convert(write_checkpoint(tmp_path / "from", config, state, (2, 2, 1)), tmp_path / "to")
    reader = LayoutFreeReader(final)
    for tp_rank in range(tp_size):
        expected = rank_state(config, state, tp_size, tp_rank)
        for quantity in QUANTITIES:
            for weight in weights(config.model):
                shard = reader.shard(weight, quantity, config.model, tp_size, tp_rank)
                assert torch.equal(shard, expected[quantity][f"gpt.{weight.megatron}"])


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    config = odd_config()
    final, *_ = convert(write_checkpoint(tmp_path / "from", config, random_state(config), (1, 1, 0)), tmp_path / "to")
    file = final / file_name("exp_avg", 0, 1)
    content = file.read_bytes()
    file.unlink()
    weight = weights(config.model)[0]
    reader = LayoutFreeReader(final)
    reader.shard(weight, "exp_avg_sq", config.model)
    with pytest.raises(CheckpointError, match=r"holds no exp_avg of model\.embed_tokens\.weight"):
        reader.shard(weight, "exp_avg", config.model)
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"exp_avg-00001-of-00001\.safetensors cannot be read"):
        LayoutFreeReader(final)


def test_which_state_is_layout_free() -> None:
    assert is_layout_free({"layout": None, "layout_free": {}})
    assert not is_layout_free({"layout": {"zero_stage": 1}})
