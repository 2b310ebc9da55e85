"""The causal mask, from transformers 4.57 and 5 alike. Shapes: B batch, S new tokens, T all tokens so far, D hidden."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask

from .configuration_sgt import SGTConfig

_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters  # they differ between transformers 4 and 5


def causal_mask(
    config: SGTConfig,
    x: Tensor,
    attention_mask: Tensor | None,
    cache_position: Tensor,
    cache: Cache | None,
    position_ids: Tensor,
) -> Any:
    """The mask of x [B, S, D] after what is in ``cache``, as the attention implementation wants it (or None).

    Args:
        attention_mask: [B, T], 0 where a token is padding; None: none is.
    """
    embeds = "inputs_embeds" if "inputs_embeds" in _MASK_ARGUMENTS else "input_embeds"
    arguments = {embeds: x, "position_ids": position_ids}
    if "cache_position" in _MASK_ARGUMENTS:
        arguments["cache_position"] = cache_position
    return create_causal_mask(config=config, attention_mask=attention_mask, past_key_values=cache, **arguments)
