"""Where the loops of the standard form may run: caches that get an entry per pass, attention that keeps none.

Loops have fewer heads than their layer, and no index of their own that a runtime knows. A runtime that keeps keys and
values by ``layer_idx`` would mix those of a layer's passes: it is refused before anything is computed.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_sgt import SGTConfig

_CACHES = (DynamicCache, StaticCache)
_QUANTIZED = "QuantizedCache"
_ENTRIES = ("DynamicLayer", "StaticLayer", "QuantoQuantizedLayer", "HQQQuantizedLayer", "Fp8QuantizedLayer")
# What a runtime with a cache of its own hands to attention through the model's arguments.
_FOREIGN = (
    "cache",
    "block_table",
    "read_index",
    "write_index",
    "attention_instances",
    "forward_batch",
    "attn_metadata",
)
_WAY_OUT = "export it with --for serving, the form in which every pass is a layer to the runtime"


def refuse_runtime(what: str) -> None:
    """Raises: ValueError, that says so."""
    raise ValueError(f"{what} would mix up the attention passes of this model, in which layers loop: {_WAY_OUT}")


def check_runtime(cache: Any, config: SGTConfig, arguments: dict[str, Any]) -> None:
    """Refuse a cache or an attention that loops cannot live in, and make room in one that they can.

    Args:
        arguments: what the model was called with beyond its own arguments.

    Raises:
        ValueError: an attention implementation that is not transformers' own, or keeps a cache; a cache of an unknown
            kind, or in use by a model with other passes.
    """
    if not config.loops():
        return
    kind = config._attn_implementation
    if not _keeps_nothing(kind):
        refuse_runtime(f"the attention implementation {kind!r}")
    if foreign := [name for name in _FOREIGN if arguments.get(name) is not None]:
        refuse_runtime(f"a runtime with a cache of its own (argument {foreign[0]!r})")
    if cache is not None:
        if type(cache) not in _CACHES and type(cache).__name__ != _QUANTIZED:
            refuse_runtime(f"a cache of the kind {type(cache).__name__}")
        if unknown := [type(e).__name__ for e in _entries(cache) if type(e).__name__ not in _ENTRIES]:
            refuse_runtime(f"a cache with entries of the kind {unknown[0]}")
        make_room_for_loops(cache, config)


def _keeps_nothing(kind: str | None) -> bool:
    """Whether an attention implementation is transformers' own, computed from what it is handed alone."""
    if kind in (None, "eager"):
        return True
    function = ALL_ATTENTION_FUNCTIONS.get(kind)
    home = getattr(getattr(function, "func", function), "__module__", None) or ""
    return home.startswith("transformers.integrations.") and "paged" not in f"{home} {kind}"


def _entries(cache: Any) -> list[Any]:
    return list(getattr(cache, "layers", None) or ())


def make_room_for_loops(cache: Cache, config: SGTConfig) -> None:
    """Give a cache that was made for one pass per layer an entry for each pass, in the order of execution.

    Raises:
        ValueError: the cache is in use already, and by a model with other loops.
    """
    passes = [config.passes_of(n) for n in range(config.num_hidden_layers)]
    layers = _entries(cache)
    if not layers:  # growing by itself
        return
    if len(layers) == sum(passes):  # made room in before, or filled by another model
        found = [layer.keys.shape[1] if _is_filled(layer) else None for layer in layers]
        other = any(n not in (None, heads) for n, heads in zip(found, _heads(config), strict=True))
    else:
        other = len(layers) != len(passes) or cache.get_seq_length() > 0
    if other:
        raise ValueError(
            f"this cache has {len(layers)} entries of another model; a model with {sum(passes)} attention passes in "
            f"{len(passes)} layers needs a new cache, made from its own configuration"
        )
    if len(layers) != sum(passes):
        cache.layers = [
            entry for layer, count in zip(layers, passes, strict=True) for entry in [layer, *_twins(layer, count - 1)]
        ]


def _is_filled(layer: Any) -> bool:
    keys = layer.keys
    return isinstance(keys, Tensor) and keys.dim() == 4 and keys.numel() > 0


def _heads(config: SGTConfig) -> list[int]:
    """Key-value heads that each pass stores, in the order of execution."""
    shared = config.num_attention_heads // config.num_key_value_heads
    heads = []
    for layer in range(config.num_hidden_layers):
        loop = config.loop_of(layer)
        looping = range(config.num_attention_heads) if loop["other_gate"] else loop["heads"]
        of_loop = len({head // shared for head in looping})
        heads += [config.num_key_value_heads, *[of_loop] * loop["depth"]] * (1 + loop["block_loops"])
    return heads


def _twins(layer: Any, count: int) -> list[Any]:
    """Empty cache layers of the same kind, which take the shape of the first keys that they are given."""
    twins = [copy.copy(layer) for _ in range(count)]
    for twin in twins:
        twin.keys = twin.values = None
        twin.is_initialized = False
        if isinstance(getattr(twin, "cumulative_length", None), Tensor):
            twin.cumulative_length = twin.cumulative_length.new_zeros(twin.cumulative_length.shape)
    return twins
