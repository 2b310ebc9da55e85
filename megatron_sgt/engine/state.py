"""The counters of a run that are not in DeepSpeed's hands."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_sgt.errors import CheckpointError


@dataclass
class TrainState:
    """Where the run stands.

    ``step``: applied optimizer steps; ``consumed_samples``: sequences taken from the data order, skipped steps
    included; ``skipped_steps``: steps without a finite gradient, in all and in a row.
    """

    step: int = 0
    consumed_samples: int = 0
    skipped_steps: int = 0
    consecutive_skipped: int = 0

    def state_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError if a counter is missing."""
        for name in asdict(self):
            if name not in state:
                raise CheckpointError(f"the checkpoint's training state has no {name!r}")
            setattr(self, name, int(state[name]))
