"""Attention as runtimes with a cache of their own want it: one module per pass, each with an index of its own.

Every pass attends with all heads, in the loops too: a runtime allots the same keys and values to each of its layers.
The output of a head times its gate (1 for a kept head, 0 for another one) is what the looping heads alone would give.
Projections are called as modules, so that whatever takes their place (fused, quantised, with an adapter, sharded) sees
every pass.

Shapes: B batch, S new tokens, T all tokens so far, D hidden, N query heads, H head size; under tensor parallelism N is
what this rank holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_sgt import SGTAttention, eager_attention_forward
from .configuration_sgt_serving import SGTServingConfig

# Where a runtime that shards a model itself says which rank this is: all have a function of this name.
_RUNTIMES = ("vllm.distributed.parallel_state", "sglang.srt.distributed.parallel_state")
_RANK = "get_tensor_model_parallel_rank"


def rank_in_runtime() -> int | None:
    """This process's rank in the tensor-parallel group of the runtime that makes the model; None: it has none."""
    for name in _RUNTIMES:
        if (module := sys.modules.get(name)) is not None:
            try:
                return int(getattr(module, _RANK)())
            except (AssertionError, AttributeError):  # imported, and not in use
                continue
    return None


class SGTPass(nn.Module):
    """One attention pass. Has no parameters: the projections of its layer are handed what it gives.

    ``layer_idx``: its place among all passes of the model, in the order of execution, and in every cache.
    """

    def __init__(self, config: SGTServingConfig, layer_idx: int, gates: tuple[float, ...] | None) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.gates = gates
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, rank: int | None, **kwargs: Any) -> Tensor:
        """query [B, N, S, H], key and value [B, *, T, H] -> [B, S, N · H], each head times its gate.

        The lookup stands here because vLLM finds the modules that attend by it.
        """
        shape = (query.shape[0], query.shape[2], -1)
        attention: Callable = eager_attention_forward
        if self.config._attn_implementation != "eager":
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        dropout = self.config.attention_dropout if self.training else 0.0
        out, _ = attention(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        out = out.reshape(shape)
        return out if self.gates is None else self._gated(out, rank)

    def _gated(self, out: Tensor, rank: int | None) -> Tensor:
        """By runs of heads with the same gate: no tensor of gates to be copied, which a CUDA graph could not record."""
        runs: list[tuple[float, int]] = []
        for gate in self._local_gates(out.shape[-1] // self.head_dim, rank):
            count = runs.pop()[1] if runs and runs[-1][0] == gate else 0
            runs.append((gate, count + 1))
        parts = out.split([count * self.head_dim for _, count in runs], dim=-1)
        return torch.cat([part if gate == 1 else part * gate for part, (gate, _) in zip(parts, runs, strict=True)], -1)

    def _local_gates(self, heads: int, rank: int | None) -> tuple[float, ...]:
        assert self.gates is not None
        total = len(self.gates)
        if heads == total:
            return self.gates
        if rank is None or total % heads or (rank + 1) * heads > total:
            raise ValueError(
                f"{heads} of {total} heads are on this rank, and the runtime does not say which: tensor parallelism is "
                "supported under vLLM, SGLang and transformers"
            )
        return self.gates[rank * heads : (rank + 1) * heads]


class SGTServingAttention(SGTAttention):
    """The projections of a layer, called once per pass."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Any,
        attend: SGTPass,
        rank: int | None,
        cache_position: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states [B, S, D] -> [B, S, D]. vLLM reads the three calls here, and makes one of them."""
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        query, key, value = self.prepare(query, key, value, (cos, sin))
        if past_key_values is not None:
            position = {"cache_position": cache_position}
            key, value = past_key_values.update(key, value, attend.layer_idx, position)
        return self.o_proj(attend(query, key, value, mask, rank, **kwargs))

    def rank(self) -> int | None:
        """This rank in transformers' own tensor parallelism; None without it."""
        mesh = getattr(getattr(self.o_proj, "weight", None), "device_mesh", None)
        return None if mesh is None else mesh.get_local_rank()


def passes_of(config: SGTServingConfig) -> list[list[SGTPass]]:
    """The passes of each layer, in the order of execution."""
    passes: list[list[SGTPass]] = []
    index = 0
    for layer in range(config.sgt_num_layers):
        loop = config.loop_of(layer)
        kept, other = set(loop["heads"]), float(loop["other_gate"])
        gates = tuple(1.0 if head in kept else other for head in range(config.num_attention_heads))
        once = [None, *[gates if min(gates) < 1 else None] * loop["depth"]]
        found = [SGTPass(config, index + n, which) for n, which in enumerate(once * (1 + loop["block_loops"]))]
        passes.append(found)
        index += len(found)
    return passes
