"""Row-parallel linear whose bias has its whole gradient under sequence parallelism."""

from __future__ import annotations

from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor


class SummedBiasRowParallelLinear(RowParallelLinear):
    """Megatron-Core's RowParallelLinear; the bias that it hands on is added to sharded tokens by its caller.

    The bias is replicated over tensor-parallel ranks, each of which adds it to its own tokens under sequence
    parallelism: the gradient must be summed over the ranks, which nobody does under DeepSpeed. Reading it through
    ``copy_to_tensor_model_parallel_region`` puts the sum into the graph (see ``norm.py``).
    """

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, B, D_in / tp] -> output [S (/ tp), B, D_out] without bias, and the bias [D_out] or None."""
        output, bias = super().forward(input_)
        return output, None if bias is None else self.summed_bias()

    def summed_bias(self) -> Tensor | None:
        """The bias; its gradient is summed over tensor-parallel ranks where these see different tokens."""
        if self.bias is None or not self.sequence_parallel:
            return self.bias
        return copy_to_tensor_model_parallel_region(self.bias)
