"""Tokens per second, FLOP/s, model FLOPs utilization (MFU) and the remaining time.

    MFU = FLOPs of the model per step / (step seconds * devices * peak FLOP/s of one device)

(Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.) The FLOPs are those the method needs, loops
included and recomputation excluded; the peak is the vendor's dense figure, without structured sparsity.
"""

from __future__ import annotations

import re

from megatron_sgt.metrics.records import Throughput

# Dense peaks of one device in TFLOP/s: (pattern of the name that the driver reports, 16-bit matrix units with
# fp32 accumulation, fp32 without TF32). NVIDIA prints figures with 2:4 sparsity: the dense ones are half.
# Sources: the vendors' data sheets and white papers (V100, T4, A100, A40, A10, L4, L40, L40S, H100, H200,
# GH200 data sheets; HGX B200/B300 and GB200 NVL72 data sheets divided by their number of GPUs; GA102, AD102
# and Blackwell RTX white papers; AMD Instinct MI210, MI250X, MI300X, MI325X, MI355X data sheets). A pattern
# names the variant where variants differ, so that a bare "H100" stays unknown.
_PEAKS_TFLOPS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bGB200\b", 2500.0, 80.0),
    (r"\bGB300\b", 2500.0, None),
    (r"\bB(200|300)\b", 2250.0, 75.0),
    (r"\bGH200\b", 989.4, 66.9),
    (r"\bH200 NVL\b", 835.5, 60.0),
    (r"\bH200\b", 989.4, 66.9),
    (r"\bH(100|800) NVL\b", 835.5, 60.0),
    (r"\bH(100|800) PCIe\b", 756.5, 51.2),
    (r"\bH(100|800)\b.*(HBM3|SXM)", 989.4, 66.9),
    (r"\bH20\b", 148.0, 44.0),
    (r"\bA(100|800)\b", 312.0, 19.5),
    (r"\bA30\b", 165.0, 10.3),
    (r"\bA40\b", 149.7, 37.4),
    (r"\bA10\b", 125.0, 31.2),
    (r"\bRTX A6000\b", 154.8, 38.7),
    (r"\bL40S\b", 362.05, 91.6),
    (r"\bL40\b", 181.05, 90.5),
    (r"\bL4\b", 121.0, 30.3),
    (r"\bRTX 5090$", 209.5, 104.8),
    (r"\bRTX 4090$", 165.2, 82.6),
    (r"\bRTX 3090$", 71.0, 35.6),
    (r"\bMI355X\b", 2516.6, 157.3),
    (r"\bMI3(00|25)X\b", 1307.4, 163.4),
    # One MI250X card is two devices to the driver.
    (r"\bMI250X\b", 191.5, 47.9),
    (r"\bMI210\b", 181.0, 45.3),
)
# Before bf16: fp16 only.
_PEAKS_TFLOPS_NO_BF16: tuple[tuple[str, float, float | None], ...] = (
    (r"\bV100S\b", 130.0, 16.4),
    (r"\bV100-SXM2\b", 125.0, 15.7),
    (r"\bV100-PCIE\b", 112.0, 14.0),
    (r"\bT4\b", 65.0, 8.1),
)
# A slice of a device, of unknown share: "A100-SXM4-40GB MIG 3g.20gb", "GRID A100-20C", "NVIDIA A10-24Q".
_SLICE = re.compile(r"\bMIG\b|\bGRID\b|-\d+[A-Z]$")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak FLOP/s of one device, or None if it is not known: then the MFU is "n/a", never a guess.

    device_name: as the driver reports it ("NVIDIA H100 80GB HBM3"); a CPU, an unlisted device and a slice
    of a shared device (MIG, vGPU) have no known peak. precision: "bf16", "fp16" or "fp32" (without TF32);
    for any other the peak is unknown.
    """
    if _SLICE.search(device_name):
        return None
    tables = [(_PEAKS_TFLOPS, ("bf16", "fp16")), (_PEAKS_TFLOPS_NO_BF16, ("fp16",))]
    for table, half_precisions in tables:
        for pattern, half, single in table:
            if not re.search(pattern, device_name, flags=re.IGNORECASE):
                continue
            tflops = half if precision in half_precisions else single if precision == "fp32" else None
            return None if tflops is None else tflops * 1e12
    return None


def tokens_per_second(tokens: float, seconds: float) -> float:
    """The rate.

    Raises:
        ValueError: ``seconds`` is not > 0.
    """
    if not seconds > 0:
        raise ValueError(f"a rate needs a time > 0 s, got {seconds}")
    return tokens / seconds


def model_flops_utilization(flops_per_second: float, peak: float | None) -> float | None:
    """Fraction of the peak that one device reaches, both in FLOP/s; None if the peak is unknown."""
    return None if peak is None else flops_per_second / peak


def throughput_record(tokens: float, flops: float, seconds: float, num_devices: int, peak: float | None) -> Throughput:
    """The throughput fields of a train record.

    tokens, flops: of the whole job during ``seconds``; peak: FLOP/s of one device or None.
    """
    rate = tokens_per_second(tokens, seconds)
    flops_per_device = flops / seconds / num_devices
    return {
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / num_devices,
        "tflops_per_device": flops_per_device / 1e12,
        "mfu": model_flops_utilization(flops_per_device, peak),
    }


class EtaEstimator:
    """Seconds until the end, from a moving average of the step time.

    ``memory_steps`` is the number of steps after which an old step time has lost 1 - 1/e of its weight. The
    first observation is forgotten as soon as a second one arrives: it contains the warm-up of the run.
    """

    def __init__(self, memory_steps: float = 100.0) -> None:
        if not memory_steps >= 1:
            raise ValueError(f"memory_steps must be at least 1, got {memory_steps}")
        self._memory_steps = memory_steps
        self._seconds_per_step: float | None = None
        self._observations = 0

    def update(self, seconds: float, steps: int = 1) -> None:
        """Add an observation: the last ``steps`` steps took ``seconds`` in all.

        Raises:
            ValueError: steps < 1.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self._observations += 1
        new = seconds / steps
        if self._seconds_per_step is None or self._observations == 2:
            self._seconds_per_step = new
            return
        # Many steps in one observation weigh as if each had one of its own.
        keep = (1.0 - 1.0 / self._memory_steps) ** steps
        self._seconds_per_step = keep * self._seconds_per_step + (1.0 - keep) * new

    @property
    def step_time_s(self) -> float | None:
        return self._seconds_per_step

    def remaining_s(self, steps_left: int) -> float | None:
        return None if self._seconds_per_step is None else self._seconds_per_step * max(0, steps_left)
