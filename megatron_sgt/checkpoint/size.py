"""What a checkpoint will take on disk, and whether it fits. Knows no torch: a login node asks, too."""

import shutil
from pathlib import Path

from megatron_sgt.cli import nearest
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.metrics.units import file_size
from megatron_sgt.planning.parameters import checkpoint_bytes


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
