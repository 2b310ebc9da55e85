from pathlib import Path

import pytest

from megatron_sgt.checkpoint import size as sizes
from megatron_sgt.errors import CheckpointError
from megatron_sgt.planning.parameters import parameter_count
from tests.helpers.single import small_config


@pytest.mark.parametrize(
    ("precision", "stage", "per_parameter"),
    [("fp32", 0, 12), ("fp32", 1, 16), ("bf16", 1, 14), ("fp16", 2, 14)],
)
def test_size_of_a_checkpoint(precision: str, stage: int, per_parameter: int) -> None:
    """Weights, two moments, and DeepSpeed's fp32 copy of the weights where it keeps one."""
    config = small_config(parallel={"zero_stage": stage})
    size = sizes.checkpoint_bytes(config, precision)
    assert size == per_parameter * parameter_count(config.model)


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(checkpoint={"save": str(tmp_path / "deep" / "down")})
    place, free = sizes.check_disk(config, "fp32")
    assert place == tmp_path and free > 0
    monkeypatch.setattr(sizes.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"takes about .*MB, but .*down has 1.00 kB free"):
        sizes.check_disk(config, "fp32")
