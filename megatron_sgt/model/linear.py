"""Megatron-Core's parallel linears, with access for a loop to their weights, or with a mask on their outputs.

A loop reads rows of W_qkv and columns of W_o. It does so *inside a call of the module*, through ``use``: ZeRO-3
fetches a module's weights when the module is called, in the forward pass and when activations are recomputed,
and every rank then calls the same modules in the same order, which ZeRO-3 insists on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

Result = TypeVar("Result")
Use = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input, this rank's weight, this rank's bias or None) -> output."""


class LoopingColumnParallelLinear(ColumnParallelLinear):
    """ColumnParallelLinear; with ``use`` it only returns ``use(input, weight, bias)``."""

    def forward(self, input_: Tensor, *args: Any, use: Use | None = None, **kwargs: Any) -> Any:
        if use is not None:
            return use(input_, self.weight, self.bias)
        return super().forward(input_, *args, **kwargs)


class LoopingRowParallelLinear(RowParallelLinear):
    """RowParallelLinear, with ``use`` as above, and with the whole gradient of its bias.

    The bias is returned to the caller, who adds it to sharded tokens under sequence parallelism: its gradient
    must be summed over the ranks, which DeepSpeed does not do. Reading it through
    ``copy_to_tensor_model_parallel_region`` puts the sum into the graph (see ``norm.py``).
    """

    def forward(self, input_: Tensor, use: Use | None = None) -> tuple[Tensor, Tensor | None]:
        """Output without bias, [S (/ tp), B, D_out], or that of ``use``; and the bias [D_out] or None."""
        bias = self.bias
        if bias is not None and self.sequence_parallel:
            bias = copy_to_tensor_model_parallel_region(bias)
        if use is not None:
            return use(input_, self.weight, None), bias
        return super().forward(input_)[0], bias


class MaskedColumnParallelLinear(ColumnParallelLinear):
    """ColumnParallelLinear whose outputs, bias included, are multiplied by ``mask``: [rows of this rank], or None."""

    mask: Tensor | None = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, bias = super().forward(input_, *args, **kwargs)
        if self.mask is None:
            return out, bias
        return out * self.mask, None if bias is None else bias * self.mask


def inside(
    modules: Sequence[Callable[..., Any]], x: Tensor, use: Callable[..., Result], *weights: Tensor | None
) -> Result:
    """``use(x, *weights)`` inside calls of all ``modules``, one within the other.

    Args:
        modules: take ``use`` as the linears above do (see also ``norm.RMSNorm``), outermost first.
        weights: arguments of ``use`` that come before the weights of the modules.
    """
    if not modules:
        return use(x, *weights)

    def with_weights(x: Tensor, *own: Tensor | None) -> Result:
        return inside(modules[1:], x, use, *weights, *own)

    return modules[0](x, use=with_weights)
