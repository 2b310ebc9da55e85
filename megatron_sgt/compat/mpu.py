"""The model-parallel unit that DeepSpeed asks for, answered from Megatron-Core's process groups.

DeepSpeed sums gradient norms, agrees on overflows and numbers its files over the ranks that share one copy of the
model: the tensor x pipeline group. Which copies of a parameter count it asks of the tensor-parallel group alone.
"""

from __future__ import annotations

from megatron.core import parallel_state


class DeepSpeedMPU:
    """Megatron-Core's ``parallel_state`` under the names that DeepSpeed's engine uses."""

    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(parallel_state.get_pipeline_model_parallel_world_size)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)

    def get_model_parallel_rank(self) -> int:
        """Tensor-parallel ranks of a stage first, then stages."""
        return parallel_state.get_model_parallel_group().rank()

    def get_model_parallel_world_size(self) -> int:
        return parallel_state.get_model_parallel_group().size()
