"""The table of GPUs: known peaks, plausible orders, clear refusals."""

import pytest

from megatron_sgt.errors import ConfigError
from megatron_sgt.planning.hardware import GPUS, find_gpu


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_has_a_peak_and_its_links_are_slower_than_its_memory(name: str) -> None:
    gpu = find_gpu(name.upper())
    assert gpu.peak("bf16") > gpu.peak("fp32") > 1e13
    assert gpu.memory_bandwidth > gpu.link >= gpu.network > 0
    assert 40e9 <= gpu.memory < 1e12


def test_an_unknown_gpu_or_precision_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'h300' is not in the table.*h100"):
        find_gpu("h300")
    with pytest.raises(ConfigError, match="int4"):
        find_gpu("h100").peak("int4")
