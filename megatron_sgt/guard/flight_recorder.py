"""Torch's flight recorder, written beside the stacks of a hang: which collective each rank was in.

On a GPU a host only queues collectives, and waits wherever it next reads the device. Its stack does not show which rank
is missing in which collective; the recorder's list does. Two forms per rank: ``rank_00003.collectives.json`` for
people, and ``nccl_trace_rank_3`` for ``torchfrtrace``, which compares the ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PREFIX = "nccl_trace_rank_"
_TORCHS_OWN = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
"""Where torch's own watchdog writes when it gives up first: the present variable, and the one before torch 2.8."""


def queues_collectives() -> bool:
    """Whether collectives run on a device while the hosts go on, so that the place of a host says little."""
    return dist.get_backend() == "nccl"


def let_torch_write_to(folder: Path) -> None:
    """Let torch write its own dump to ``folder`` too, unless the user chose a place; NCCL reads this when it dumps."""
    for name in _TORCHS_OWN:
        os.environ.setdefault(name, str(folder / PREFIX))


def write(folder: Path, rank: int) -> str:
    """Write what this rank's recorder holds, in both forms; return a line that says so, or why there is nothing.

    May block on a driver that does not answer: see ExitProtocol.dump_collectives.

    Raises:
        OSError, RuntimeError: the record cannot be written.
    """
    as_json, as_pickle = _recorder()
    if as_json is None:
        return "this torch has no flight recorder"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"rank_{rank:05d}.collectives.json"
    path.write_bytes(_bytes(as_json()))
    if as_pickle is not None:
        (folder / f"{PREFIX}{rank}").write_bytes(_bytes(as_pickle()))
    return f"its last collectives: {path}"


def _recorder() -> tuple[Callable[[], Any] | None, Callable[[], Any] | None]:
    """Torch's functions for JSON and pickle; None for one that it lacks.

    NCCL has a recorder of its own, which only torch's builds for GPUs know; the general one has nothing of NCCL's.
    """
    c10d = torch._C._distributed_c10d
    kind = "nccl" if queues_collectives() else "fr"
    return getattr(c10d, f"_dump_{kind}_trace_json", None), getattr(c10d, f"_dump_{kind}_trace", None)


def _bytes(content: bytes | str) -> bytes:
    return content.encode() if isinstance(content, str) else content
