"""The model-parallel unit that DeepSpeed asks for, answered from Megatron-Core's process groups.

DeepSpeed calls ``get_model_parallel_rank()`` and friends; Megatron-Core has no such names since it split
"model parallel" into tensor and pipeline. Without pipeline parallelism they are the tensor-parallel ones.
"""

from __future__ import annotations

from megatron.core import parallel_state
from torch.distributed import ProcessGroup


class DeepSpeedMPU:
    """Adapter: Megatron-Core's ``parallel_state`` under the names that DeepSpeed's engine uses."""

    def get_model_parallel_rank(self) -> int:
        """Rank in the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_model_parallel_world_size(self) -> int:
        """Size of the tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_model_parallel_group(self) -> ProcessGroup:
        """The tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_group()

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first member of this tensor-parallel group."""
        return parallel_state.get_tensor_model_parallel_src_rank()

    def get_pipeline_model_parallel_rank(self) -> int:
        """Rank in the pipeline group."""
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Size of the pipeline group (1: pipeline parallelism is refused by the configuration)."""
        return parallel_state.get_pipeline_model_parallel_world_size()

    def get_data_parallel_rank(self) -> int:
        """Rank in the data-parallel group."""
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_group(self) -> ProcessGroup:
        """The data-parallel group."""
        return parallel_state.get_data_parallel_group()
