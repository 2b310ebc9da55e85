"""Attention of a Sparse Growing Transformer, its loops, and their place in transformers' caches.

Every attention pass has keys and values of its own: a cache holds one entry per pass, in the order of execution,
an entry of a loop only the keys and values of the heads that loop.

Shapes: B batch, S new tokens, T all tokens so far, D hidden, N query heads, H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.module_tracker import ModuleTracker
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_sgt import SGTConfig

try:  # private to torch: without them a loop that is traced calls whole projections, which is right, too
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    _TRACED: tuple[type, ...] = (FakeTensor, FunctionalTensor)
except ImportError:
    _TRACED = ()


class SGTRMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · w over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [..., size]: a name by which vLLM knows their shape."""
        return F.rms_norm(hidden_states, (hidden_states.shape[-1],), self.weight, self.eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, *, S, H] in the half-split convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """The definition, as transformers wants it: query [B, N, S, H] -> ([B, S, N, H], weights [B, N, S, T])."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(repeat, dim=1) if repeat > 1 else t for t in (key, value))
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[:, :, :, : key.shape[-2]]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> tuple:
    kind = module.config._attn_implementation
    attention: Callable = eager_attention_forward if kind == "eager" else ALL_ATTENTION_FUNCTIONS[kind]
    dropout = module.config.attention_dropout if module.training else 0.0
    return attention(module, query, key, value, mask, dropout=dropout, scaling=module.scaling, **kwargs)


class SGTAttention(nn.Module):
    """The ordinary attention of all heads; keeps the weights that the loops use again."""

    def __init__(self, config: SGTConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=config.attention_bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=config.attention_out_bias)
        self.norms_all_heads = config.qk_norm and config.qk_norm_over == "all"
        if config.qk_norm:
            sizes = (queries, keys) if self.norms_all_heads else (self.head_dim, self.head_dim)
            self.q_norm, self.k_norm = (SGTRMSNorm(size, config.rms_norm_eps) for size in sizes)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Any, cached: CachedPass, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, S, D] -> (output [B, S, D], attention weights or None)."""
        query, key, value = self.prepare(self.q_proj(x), self.k_proj(x), self.v_proj(x), rotary)
        key, value = cached.update(key, value)
        out, weights = _attend(self, query, key, value, mask, **kwargs)
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), weights

    def prepare(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projections of all heads [B, S, heads · H] -> [B, heads, S, H], queries and keys normalised and rotated."""
        return self.rotated(*self.normalised(query, key), value, rotary)

    def normalised(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys of all heads [B, S, heads · H], normalised if that is over all of them.

        Raises:
            ValueError: it is, and these are not all.
        """
        if not self.norms_all_heads:
            return query, key
        found, wanted = query.shape[-1] // self.head_dim, self.config.num_attention_heads
        if found != wanted:
            raise ValueError(
                f"{found} of {wanted} heads are on this rank, and queries are normalised over all of them: serve this "
                "model without tensor parallelism"
            )
        return self.q_norm(query), self.k_norm(key)

    def rotated(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Any heads [B, S, heads · H] -> [B, heads, S, H], queries and keys rotated, after norms of each head."""
        query, key, value = (t.unflatten(-1, (-1, self.head_dim)) for t in (query, key, value))
        if self.config.qk_norm and not self.norms_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        return _rotate(query, *rotary), _rotate(key, *rotary), value


class CachedPass:
    """The place of one attention pass in a cache (or in none)."""

    def __init__(self, cache: Cache | None, index: int, cache_position: Tensor | None) -> None:
        self.cache = cache
        self.index = index
        self.cache_position = cache_position

    def update(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append new keys and values [B, *, S, H]; returns all."""
        if self.cache is None:
            return key, value
        return self.cache.update(key, value, self.index, {"cache_position": self.cache_position})


class SGTHeadLoop(nn.Module):
    """One more pass of the looping heads of a layer, with the weights of its attention. Has no parameters.

    Inside a decay window (``other_gate`` above 0) all heads loop, those not kept times ``other_gate``.
    """

    def __init__(self, config: SGTConfig, layer_idx: int) -> None:
        super().__init__()
        loop = config.loop_of(layer_idx)
        kept, gate = set(loop["heads"]), float(loop["other_gate"])
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.num_key_value_groups = 1  # forward() gives every head its own keys and values
        self.scaling = config.head_dim**-0.5
        self.heads = list(range(config.num_attention_heads)) if gate else sorted(kept)
        shared = config.num_attention_heads // config.num_key_value_heads
        self.groups = sorted({head // shared for head in self.heads})
        self.slots = [self.groups.index(head // shared) for head in self.heads]
        self.gates = [1.0 if head in kept else gate for head in self.heads] if gate else None

    def forward(
        self,
        attention: SGTAttention,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Any,
        cached: CachedPass,
        **kwargs: Any,
    ) -> Tensor:
        """x [B, S, D] -> [B, S, D]."""
        size = attention.head_dim
        if attention.norms_all_heads:
            query, key = attention.normalised(attention.q_proj(x), attention.k_proj(x))
            query, key = _blocks(query, self.heads, size), _blocks(key, self.groups, size)
        else:
            query = _some_rows(attention.q_proj, x, self.heads, size)
            key = _some_rows(attention.k_proj, x, self.groups, size)
        value = _some_rows(attention.v_proj, x, self.groups, size)
        query, key, value = attention.rotated(query, key, value, rotary)
        key, value = cached.update(key, value)
        if self.slots != list(range(len(self.groups))):
            key, value = (torch.cat([t[:, s : s + 1] for s in self.slots], dim=1) for t in (key, value))
        if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:  # one for each head
            mask = mask[:, self.heads]
        out, _ = _attend(self, query, key, value, mask, **kwargs)
        if self.gates is not None:
            out = out * torch.tensor(self.gates, dtype=out.dtype, device=out.device)[:, None]
        return _some_columns(
            attention.o_proj,
            out.reshape(*x.shape[:-1], -1),
            self.heads,
            size,
            self.config.num_attention_heads,
        )


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# A tensor's own class, and what stands for it while torch traces. Others (quantised, distributed) have no plain rows.
_PLAIN_TENSORS = (Tensor, nn.Parameter, *_TRACED)


def _is_plain(linear: nn.Module) -> bool:
    """Whether a slice of the weight does what the module does, and nobody looks on.

    Not with adapters, quantised, parametrised (other classes of modules or tensors), pruned, offloaded, spread by
    ZeRO-3 or watched (hooks, or a ``forward`` of the instance's own).
    """
    return (
        type(linear) is nn.Linear
        and "forward" not in linear.__dict__
        and not any(getattr(linear, hooks) for hooks in _HOOKS)
        and not any(_looks_on(hook) for hooks in _HOOKS for hook in _hooks_of_all_modules(hooks))
        and type(linear.weight) in _PLAIN_TENSORS
        and linear.weight.shape == (linear.out_features, linear.in_features)
        and not linear.weight.is_meta
    )


def _hooks_of_all_modules(kind: str) -> list[Any]:
    return list(getattr(torch.nn.modules.module, "_global" + kind).values())


def _looks_on(hook: Any) -> bool:
    """Not the tracker of torch's FLOP counter, which notes names alone, and which is to count what is done."""
    return not isinstance(getattr(hook, "__self__", None), ModuleTracker)


def _blocks(x: Tensor, blocks: Sequence[int], size: int) -> Tensor:
    return torch.cat([x[..., b * size : (b + 1) * size] for b in blocks], dim=-1)


def _some_rows(linear: Any, x: Tensor, blocks: Sequence[int], size: int) -> Tensor:
    if not _is_plain(linear):
        return _blocks(linear(x), blocks, size)
    weight = torch.cat([linear.weight[b * size : (b + 1) * size] for b in blocks])
    bias = linear.bias
    if bias is not None:
        bias = torch.cat([bias[b * size : (b + 1) * size] for b in blocks])
    return F.linear(x, weight, bias)


def _some_columns(linear: Any, x: Tensor, blocks: Sequence[int], size: int, total: int) -> Tensor:
    """``linear`` of an input that is ``x`` in ``blocks`` of ``total``, and 0 in the others."""
    if _is_plain(linear):
        weight = torch.cat([linear.weight[:, b * size : (b + 1) * size] for b in blocks], dim=1)
        return F.linear(x, weight, linear.bias)
    parts = dict(zip(blocks, x.split(size, dim=-1), strict=True))
    zeros = torch.zeros_like(x[..., :size])
    return linear(torch.cat([parts.get(b, zeros) for b in range(total)], dim=-1))
