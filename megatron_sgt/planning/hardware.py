"""What machines can do, from their makers' data sheets: figures for planning, not measurements.

Memory in bytes as sold (10^9; drivers report up to 7 % more). Links in bytes per second and direction: ``link``
between the GPUs of a node (NVLink, Infinity Fabric, else PCIe), ``network`` per GPU between nodes, as the maker's
eight-GPU systems are built (DGX/HGX: one 400 Gb/s adapter per H100, H200 or B200; one 200 Gb/s per A100).

Sources: NVIDIA data sheets of A100 (2021), H100 (2023), H200 (2023), HGX B200 (2024) and L40S (2023); DGX A100, H100
and B200 user guides for the network; AMD data sheet of MI300X (2023). Peaks: ``metrics.throughput``.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgt.errors import ConfigError
from megatron_sgt.metrics.throughput import peak_flops

USABLE = 0.92
"""Share of a device's memory that tensors may fill: the rest is the context, workspaces and fragmentation."""


@dataclass(frozen=True)
class Gpu:
    """One device. ``driver_name``: as the driver reports it; ``memory`` bytes; the rest bytes per second."""

    driver_name: str
    memory: float
    memory_bandwidth: float
    link: float
    network: float

    def peak(self, precision: str) -> float:
        """Dense peak FLOP/s of matrix products in ``precision``.

        Raises:
            ConfigError: the peak is not known.
        """
        peak = peak_flops(self.driver_name, precision)
        if peak is None:
            raise ConfigError(f"the peak of {self.driver_name} in {precision} is not known; use bf16 or fp32")
        return peak


GPUS: dict[str, Gpu] = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80e9, 2.039e12, 300e9, 25e9),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 40e9, 1.555e12, 300e9, 25e9),
    "b200": Gpu("NVIDIA B200", 180e9, 7.7e12, 900e9, 50e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80e9, 3.35e12, 450e9, 50e9),
    "h100-pcie": Gpu("NVIDIA H100 PCIe", 80e9, 2.0e12, 64e9, 25e9),
    "h200": Gpu("NVIDIA H200", 141e9, 4.8e12, 450e9, 50e9),
    "l40s": Gpu("NVIDIA L40S", 48e9, 0.864e12, 32e9, 25e9),
    "mi300x": Gpu("AMD Instinct MI300X", 192e9, 5.3e12, 448e9, 50e9),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name, in any case.

    Raises:
        ConfigError: listing those that are known.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"GPU '{name}' is not in the table; choose one of {', '.join(GPUS)}")
    return gpu
