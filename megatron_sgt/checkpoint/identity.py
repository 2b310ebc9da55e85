"""Whose a file of a checkpoint is, said inside the file: its name, which holds its ranks, the step and the layout.

A manifest finds a file that is not the one that was saved. This finds one that was saved as another's, whatever the
manifest says. DeepSpeed's own entries stay as they are; files of older versions say nothing and are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sgt.checkpoint.forms import LAYOUT_FREE, read_state
from megatron_sgt.checkpoint.restricted import load_restricted
from megatron_sgt.errors import DamagedCheckpointError

KEY = "sgt_identity"


@dataclass(frozen=True)
class Identity:
    """Of the files that one rank writes in one save. ``layout``: that they are written under."""

    step: int
    layout: Mapping[str, Any]
    rank: int

    def stamped(self, content: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """``content`` with what it is."""
        return {**content, KEY: {"file": path.name, "step": self.step, "layout": dict(self.layout)}}


def load_file(path: Path, mapped: bool = True) -> dict[str, Any]:
    """The content of a file of a checkpoint, which must be the one that its place says; see ``load_restricted``.

    Raises:
        DamagedCheckpointError: it cannot be read, or belongs to another rank, step or layout.
    """
    content = load_restricted(path, mapped)
    if KEY in content:
        _check(content[KEY], path)
    return content


def _check(about: Any, path: Path) -> None:
    state = read_state(path.parent)
    where = state["layout"] or state[LAYOUT_FREE]["source_layout"]
    wanted = {"file": path.name, "step": state["trainer"]["step"], "layout": where}
    if about == wanted:
        return
    said = about if isinstance(about, dict) else {}
    differing = [f"{key} {said.get(key)} instead of {wanted[key]}" for key in wanted if said.get(key) != wanted[key]]
    raise DamagedCheckpointError(f"{path} is another file of a checkpoint: it says {'; '.join(differing)}")
