"""Every shipped kernel compiles for sm_80 and sm_90 in bf16, without spilling, within the device's limits.

No GPU is needed: the assembler comes with Triton. ``python -m tests.helpers.ahead_of_time`` prints the table.
"""

import pytest

pytest.importorskip("triton")

from tests.helpers.ahead_of_time import ARCHITECTURES, HEAD_SIZES, KERNELS, compile_kernel

# Bytes of shared memory that one program can have (CUDA programming guide, compute capabilities 8.0 and 9.0).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 255
"""Most that a thread can have; what does not fit goes to the stack, which must stay empty."""


@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", KERNELS)
def test_fits_the_machine(name: str, arch: int, size: int) -> None:
    kernel = KERNELS[name]
    found = compile_kernel(kernel, arch, size)
    assert found["STACK"] == 0 and found["STL"] == 0, found
    assert 0 < found["REG"] <= REGISTERS, found
    assert found["smem"] <= SHARED_MEMORY[arch], found
    # wgmma on Hopper, mma on Ampere.
    instructions = found["HGMMA" if arch == 90 else "HMMA"]
    assert (instructions > 0) == kernel.tensor_cores, found
