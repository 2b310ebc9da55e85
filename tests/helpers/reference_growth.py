"""Growth of models in plain PyTorch, to test against: slices of weights under Hugging Face names, nothing shared.

``params``: the weights of a decoder, or one of AdamW's moments under the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Params = dict[str, Tensor]


def in_order(params: Params, order: Sequence[int]) -> Params:
    """Whole layers of ``params``, new layer i being old layer ``order[i]``."""
    grown = {name: tensor for name, tensor in params.items() if ".layers." not in name}
    for new, old in enumerate(order):
        prefix = f"model.layers.{old}."
        for name, tensor in params.items():
            if name.startswith(prefix):
                grown[f"model.layers.{new}.{name.removeprefix(prefix)}"] = tensor
    return grown


def midas(blocks: list[str]) -> list[str]:
    """One growth of a list of blocks that are named "b0", "b1 <- b0", ...: the middle one again, as the newest."""
    middle = (len(blocks) + 1) // 2 - 1
    copy = f"b{len(blocks)} <- {blocks[middle].split()[0]}"
    return [*blocks[: middle + 1], copy, *blocks[middle + 1 :]]


def wider(params: Params, hidden: int, ffn: int, drawn: Params, size: int, groups: tuple[int, int]) -> Params:
    """MSG without masks: to ``hidden`` dimensions, ``ffn`` units; new heads and key/value heads come last.

    Args:
        drawn: the initial values of the new model, whole.
        size: of a head. groups: (key/value heads of the new model, query heads of each).
    """
    old_hidden = params["model.norm.weight"].numel()
    root = (old_hidden / hidden) ** 0.5
    new_kv, share = groups
    grown: Params = {}
    for name, old in params.items():
        module = name.split(".")[-2]
        if module.endswith("layernorm") or module == "norm":
            grown[name] = torch.cat([old * root, torch.ones(hidden - old_hidden, dtype=old.dtype)])
            continue
        if module in ("q_norm", "k_norm"):
            grown[name] = old
            continue
        rows, columns = {
            "embed_tokens": (old.shape[0], hidden),
            "lm_head": (old.shape[0], hidden),
            "q_proj": (new_kv * share * size, hidden),
            "k_proj": (new_kv * size, hidden),
            "v_proj": (new_kv * size, hidden),
            "o_proj": (hidden, new_kv * share * size),
            "gate_proj": (ffn, hidden),
            "up_proj": (ffn, hidden),
            "down_proj": (hidden, ffn),
        }[module]
        writes = module in ("embed_tokens", "o_proj", "down_proj")
        shape = (rows,) if old.dim() == 1 else (rows, columns)
        new = torch.zeros(shape, dtype=old.dtype) if writes else drawn[name].to(old.dtype).clone()
        scaled = (
            old * root if module in ("q_proj", "k_proj") and "model.layers.0.self_attn.q_norm.weight" in params else old
        )
        if old.dim() == 1:
            new[: old.shape[0]] = scaled
        else:
            new[: old.shape[0], : old.shape[1]] = scaled
        grown[name] = new
    return grown


def split_units(params: Params, factor: int) -> Params:
    """Every feed-forward unit ``factor`` times: Net2Net's W1 tiled, W2 tiled and divided."""
    grown = dict(params)
    for name, old in params.items():
        module = name.split(".")[-2]
        if module in ("gate_proj", "up_proj"):
            grown[name] = torch.cat([old] * factor)
        elif module == "down_proj" and old.dim() == 2:
            grown[name] = torch.cat([old / factor] * factor, dim=1)
    return grown
