"""The table of tiles: complete, and chosen by architecture and head size."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_sgt.ops import tiles

KERNELS = tuple(tiles._ENTRIES)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", [tiles.AMD, 80, 86, 90, 100, 120])
@pytest.mark.parametrize("size", tiles.SIZES)
def test_every_kernel_has_a_tile(kernel: str, arch: int, size: int) -> None:
    shape, launch = tiles.entry(kernel, arch, size)
    assert shape["BM"] >= 16 and launch["num_warps"] in (4, 8) and launch["num_stages"] >= 1
    assert all(value & (value - 1) == 0 for value in shape.values())  # powers of two
    if kernel in ("project_out", "input_gradient"):
        assert size % shape["BK"] == 0  # these step along a head


def test_parts_are_made_of_whole_tiles() -> None:
    """Otherwise the kernels that sum the parts would read memory that was never written."""
    for kernel in ("attend", "attend_backward"):
        for arch, size in itertools.product((tiles.AMD, 80, 90, 100, 120), tiles.SIZES):
            shape = tiles.entry(kernel, arch, size)[0]
            for part in (tiles.FORWARD_PART, tiles.BACKWARD_PART, tiles.split_keys(torch.empty(1), 10**6, 1)):
                assert not any(part % edge for edge in shape.values())


def test_the_last_entry_that_fits_counts() -> None:
    assert tiles.entry("project_in", 80, 128)[0]["BK"] == 32
    assert tiles.entry("project_in", 90, 128)[0]["BK"] == 64
    assert tiles.entry("project_in", 90, 64)[1]["num_warps"] == 4


def test_amd_s_numbers_are_not_nvidia_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of AMD that calls itself 9.4 has its own tiles, not Hopper's."""
    x = SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 4))
    assert tiles.arch_of(x) == 94  # type: ignore[arg-type]
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert tiles.arch_of(x) == tiles.AMD  # type: ignore[arg-type]
    assert tiles.entry("attend", tiles.AMD, 128) != tiles.entry("attend", 94, 128)


def test_older_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no tile of attend for compute capability 7\.5"):
        tiles.entry("attend", 75, 64)


def test_on_a_cpu_the_interpreter_splits_keys() -> None:
    x = torch.empty(1)
    assert tiles.arch_of(x) == tiles.INTERPRETED
    assert (tiles.split_keys(x, 96, 4), tiles.split_keys(x, 300, 4)) == (96, 128)
