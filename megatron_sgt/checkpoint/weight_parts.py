"""Weights that all data-parallel ranks hold (ZeRO 0 to 2), each rank writing a share.

DeepSpeed lets the first data-parallel rank write the whole module, so the first node writes all weights while the
others wait. Here that file holds one rank's share, and the shares of the other ranks lie beside it:

    mp_rank_00_model_states.pt     what DeepSpeed writes, with a share of ``module`` and the names of all of it
    weights_0001_mp_rank_00.pt     the share of data-parallel rank 1, ...

A checkpoint without the names (of one rank, or an older version) holds the whole module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sgt.checkpoint import layout
from megatron_sgt.errors import CheckpointError

MODULE = "module"
_NAMES, _PARTS = "sgt_weight_names", "sgt_weight_parts"


def share(module: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """The tensors of ``module`` that ``rank`` of ``ranks`` writes: whole tensors, about as many bytes for each."""
    loads = [0] * ranks
    mine = set()
    for name in sorted(module, key=lambda name: (-module[name].nbytes, name)):
        owner = loads.index(min(loads))
        loads[owner] += module[name].nbytes
        if owner == rank:
            mine.add(name)
    return {name: tensor for name, tensor in module.items() if name in mine}


def without_weights(content: dict[str, Any], ranks: int) -> dict[str, Any]:
    """``content`` with its weights replaced by their names and the number of ``ranks`` that write them."""
    rest = {name: value for name, value in content.items() if name != MODULE}
    return {**rest, _NAMES: list(content[MODULE]), _PARTS: ranks}


def merged(content: dict[str, Any], path: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    """The content of ``path`` with the whole module, in its order, from all parts.

    Raises:
        CheckpointError: a part is missing or lacks a tensor.
    """
    if _NAMES not in content:
        return content
    tensors = dict(content[MODULE])
    for dp_rank in range(1, content[_PARTS]):
        tensors |= read(path.with_name(layout.part_file(path.name, dp_rank)))
    if missing := [name for name in content[_NAMES] if name not in tensors]:
        raise CheckpointError(f"{path.parent}: weights are missing: {missing[:4]}")
    whole = OrderedDict((name, tensors[name]) for name in content[_NAMES])
    return {name: value for name, value in content.items() if name not in (_NAMES, _PARTS)} | {MODULE: whole}
