"""DeepSpeed's names for Megatron-Core's groups."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_sgt.compat.mpu import DeepSpeedMPU
from megatron_sgt.config.parallel import ParallelConfig
from megatron_sgt.launch.environment import discover
from megatron_sgt.parallel.device import select_device
from megatron_sgt.parallel.groups import initialize_groups

TRANSLATION = {
    "get_model_parallel_group": "get_model_parallel_group",
    "get_tensor_model_parallel_rank": "get_tensor_model_parallel_rank",
    "get_tensor_model_parallel_world_size": "get_tensor_model_parallel_world_size",
    "get_tensor_model_parallel_group": "get_tensor_model_parallel_group",
    "get_tensor_model_parallel_src_rank": "get_tensor_model_parallel_src_rank",
    "get_pipeline_model_parallel_rank": "get_pipeline_model_parallel_rank",
    "get_pipeline_model_parallel_world_size": "get_pipeline_model_parallel_world_size",
    "get_data_parallel_rank": "get_data_parallel_rank",
    "get_data_parallel_world_size": "get_data_parallel_world_size",
    "get_data_parallel_group": "get_data_parallel_group",
}


@pytest.mark.parametrize("name", TRANSLATION)
def test_translation(name: str) -> None:
    assert getattr(DeepSpeedMPU(), name) is getattr(parallel_state, TRANSLATION[name])


def test_the_table_is_complete() -> None:
    assert {name for name in vars(DeepSpeedMPU) if name.startswith("get_")} == {
        *TRANSLATION,
        "get_model_parallel_rank",
        "get_model_parallel_world_size",
    }


def test_one_process() -> None:
    initialize_groups(ParallelConfig(device="cpu"), discover({}), select_device("cpu", 0))
    mpu = DeepSpeedMPU()
    for kind in ("model_parallel", "tensor_model_parallel", "pipeline_model_parallel", "data_parallel"):
        assert getattr(mpu, f"get_{kind}_rank")() == 0
        assert getattr(mpu, f"get_{kind}_world_size")() == 1
    assert mpu.get_tensor_model_parallel_src_rank() == 0
    for group in (mpu.get_model_parallel_group(), mpu.get_data_parallel_group()):
        assert dist.get_process_group_ranks(group) == [0]
