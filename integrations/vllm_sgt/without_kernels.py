"""PyTorch in place of the compiled CPU operators that vLLM's wheel for CUDA lacks, to run its engine without a GPU.

For checks of small models in one process, with VLLM_TARGET_DEVICE=cpu; written for vLLM 0.33. Everything else is
vLLM's own: scheduler, paged cache, block tables, layers, weight loading, sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, *_: Any, **__: Any) -> None:
    """key, value [T, G, H] into the paged caches [blocks, G, block size, H], where ``slots`` says."""
    slots = slots[: len(key)]
    used = slots >= 0
    block, place = slots[used] // keys.shape[2], slots[used] % keys.shape[2]
    keys[block, :, place] = key[: len(slots)][used]
    values[block, :, place] = value[: len(slots)][used]


def _attend(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, output: Tensor, query_start_loc: Tensor, seq_lens: Tensor,
    scale: float, block_table: Tensor, **_: Any,
) -> None:  # fmt: skip
    """Causal attention of each request's new tokens, in float64. query, output [T, N, H]."""
    groups, size = key_cache.shape[1:3]
    for n, total in enumerate(seq_lens.tolist()):
        rows = slice(int(query_start_loc[n]), int(query_start_loc[n + 1]))
        new = query[rows].transpose(0, 1).double()
        blocks = block_table[n, : -(-total // size)].long()
        key, value = (
            cache[blocks].transpose(1, 2).reshape(-1, groups, cache.shape[-1])[:total].transpose(0, 1).double()
            for cache in (key_cache, value_cache)
        )
        key, value = (t.repeat_interleave(len(new) // groups, 0) for t in (key, value))
        hidden = torch.ones(new.shape[1], total, dtype=torch.bool).triu(total - new.shape[1] + 1)
        weights = (new @ key.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        output[rows] = (weights @ value).transpose(0, 1).to(output.dtype)


def _slots(starts: Tensor, positions: Tensor, table: Tensor, slots: Tensor, size: int) -> None:
    for n in range(len(starts) - 1):
        rows = slice(int(starts[n]), int(starts[n + 1]))
        at = positions[rows]
        slots[rows] = table[n, (at // size).long()].long() * size + at % size


def install() -> list[torch.library.Library]:
    """Put them in place; the registrations last as long as what is returned."""
    import vllm._custom_ops as operators
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    library = torch.library.Library("_C", "FRAGMENT")
    for name, signature, function in (
        ("init_cpu_memory_env", "(int[] nodes) -> ()", lambda nodes: None),
        ("compute_slot_mapping_kernel_impl", "(Tensor a, Tensor b, Tensor c, Tensor(a!) d, int e) -> ()", _slots),
        ("greedy_argmax", "(Tensor a) -> Tensor", lambda logits: logits.argmax(-1)),
    ):
        library.define(name + signature)
        library.impl(name, function, "CompositeExplicitAutograd")
    operators.cpu_attn_get_scheduler_metadata = lambda *_, **__: torch.zeros(1)
    operators.cpu_attn_reshape_and_cache = _write
    operators.cpu_attention_with_kv_cache = _attend
    RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native
    return [library]
