"""Reads the pickled files of checkpoints, DeepSpeed's and ours, without running code from them.

The one place where a pickle of a checkpoint is opened: torch's own restricted unpickler, which knows tensors and
plain values, with the few classes that DeepSpeed adds. Their constructors set attributes and nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_sgt.errors import CheckpointError


def allowed_classes() -> list[Any]:
    """All that DeepSpeed pickles beside tensors and plain Python values."""
    # Not at the top: importing DeepSpeed takes seconds, and it must know its device first.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def load_restricted(path: Path, mapped: bool = True) -> dict[str, Any]:
    """The content of one file, its tensors on the CPU; ``mapped``: left on disk, so that only what is used is read.

    Raises:
        CheckpointError: the file cannot be read, or holds a class that is not on the list.
    """
    try:
        with torch.serialization.safe_globals(allowed_classes()):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
