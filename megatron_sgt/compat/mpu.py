"""The model-parallel unit that DeepSpeed asks for, answered from Megatron-Core's process groups.

DeepSpeed calls ``get_model_parallel_rank()`` and friends; Megatron-Core has no such names since it split
"model parallel" into tensor and pipeline. Without pipeline parallelism they are the tensor-parallel ones.
"""

from __future__ import annotations

from megatron.core import parallel_state


class DeepSpeedMPU:
    """Megatron-Core's ``parallel_state`` under the names that DeepSpeed's engine uses."""

    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group
    # Always 1 of 1: the configuration refuses pipeline parallelism.
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
