"""What a checkpoint will take on disk, and whether it fits. Knows no torch: a login node asks, too."""

import shutil
from pathlib import Path

from megatron_sgt.cli import nearest
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.metrics.units import file_size
from megatron_sgt.planning.parameters import parameter_count

# Bytes per parameter: the weights; AdamW's two moments, with an fp32 copy of the weights under ZeRO and
# wherever the weights are not fp32 themselves.
_WEIGHT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_MOMENT_BYTES, _COPY_BYTES = 8, 4


def checkpoint_bytes(config: Config, precision: str) -> int:
    """Bytes of one checkpoint of the model: weights and optimizer state."""
    copied = precision != "fp32" or config.parallel.zero_stage > 0
    per_parameter = _WEIGHT_BYTES[precision] + _MOMENT_BYTES + (_COPY_BYTES if copied else 0)
    return parameter_count(config.model) * per_parameter


def check_disk(config: Config, precision: str) -> tuple[Path, int]:
    """The place that checkpoints go to and its free bytes. Raises CheckpointError if not one fits there."""
    place, size = nearest(config.save_dir), checkpoint_bytes(config, precision)
    free = shutil.disk_usage(place).free
    if free < size:
        raise CheckpointError(
            f"a checkpoint takes about {file_size(size)}, but {config.save_dir} has {file_size(free)} free; "
            "make room, or set checkpoint.save to another place"
        )
    return place, free
