"""Weights that every data-parallel rank has, written by all of them: at ZeRO 0 to 2 each writes a share.

DeepSpeed lets the first data-parallel rank write the whole module, so that the first node writes all weights while
the others wait. Here its file holds that rank's share, and the other ranks' lie beside it:

    mp_rank_00_model_states.pt     what DeepSpeed writes, with a share of ``module`` and the names of all of it
    weights_0001_mp_rank_00.pt     the share of data-parallel rank 1, ...

A checkpoint without the names (of one rank, or of an older version) is whole as it is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_sgt.errors import CheckpointError

MODULE = "module"
_NAMES, _PARTS = "sgt_weight_names", "sgt_weight_parts"


def part_file(model_file: str, dp_rank: int) -> str:
    """Where data-parallel rank ``dp_rank`` > 0 writes its share of what DeepSpeed would put into ``model_file``."""
    return f"weights_{dp_rank:04d}_{model_file.removesuffix('_model_states.pt')}.pt"


def is_shared(path: Path) -> bool:
    """Whether ``path`` is a file of weights that every data-parallel rank has (not one of ZeRO-3)."""
    return path.name.startswith("mp_rank_") and path.name.endswith("_model_states.pt")


def share(module: Mapping[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """The tensors of ``module`` that ``rank`` of ``ranks`` writes: about as many bytes for each, of whole tensors."""
    loads = [0] * ranks
    mine = set()
    for name in sorted(module, key=lambda name: (-module[name].nbytes, name)):
        owner = loads.index(min(loads))
        loads[owner] += module[name].nbytes
        if owner == rank:
            mine.add(name)
    return {name: tensor for name, tensor in module.items() if name in mine}


def without_weights(content: dict[str, Any], ranks: int) -> dict[str, Any]:
    """``content`` with the names of its weights and the number of ``ranks`` that write them in the weights' place."""
    rest = {name: value for name, value in content.items() if name != MODULE}
    return {**rest, _NAMES: list(content[MODULE]), _PARTS: ranks}


def merged(content: dict[str, Any], path: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    """The content of ``path`` with the whole module, in its order, from all parts.

    Raises CheckpointError when a part is missing or lacks a tensor.
    """
    if _NAMES not in content:
        return content
    tensors = dict(content[MODULE])
    for dp_rank in range(1, content[_PARTS]):
        tensors |= read(path.with_name(part_file(path.name, dp_rank)))
    if missing := [name for name in content[_NAMES] if name not in tensors]:
        raise CheckpointError(f"{path.parent}: weights are missing: {missing[:4]}")
    whole = OrderedDict((name, tensors[name]) for name in content[_NAMES])
    return {name: value for name, value in content.items() if name not in (_NAMES, _PARTS)} | {MODULE: whole}
