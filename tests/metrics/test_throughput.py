"""Peaks are the vendors' dense figures or unknown; rates and the remaining time are plain arithmetic."""

import pytest

from megatron_sgt.metrics.throughput import (
    EtaEstimator,
    model_flops_utilization,
    peak_flops,
    throughput_record,
    tokens_per_second,
)


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312.0),
        ("NVIDIA A100 80GB PCIe", "fp16", 312.0),
        ("NVIDIA A100-SXM4-40GB", "fp32", 19.5),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H200 NVL", "bf16", 835.5),
        ("NVIDIA GH200 480GB", "bf16", 989.4),
        ("NVIDIA B200", "bf16", 2250.0),
        ("NVIDIA GB200", "bf16", 2500.0),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L40", "bf16", 181.05),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA A10", "bf16", 125.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla V100-SXM2-32GB", "fp16", 125.0),
        ("Tesla V100-PCIE-16GB", "fp32", 14.0),
        ("AMD Instinct MI300X", "bf16", 1307.4),
        ("AMD Instinct MI250X", "bf16", 191.5),
    ],
)
def test_known_peaks(name: str, precision: str, tflops: float) -> None:
    assert peak_flops(name, precision) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("cpu", "fp32"),
        ("Intel(R) Xeon(R) Platinum 8480+", "fp32"),
        ("", "bf16"),
        ("NVIDIA H100", "bf16"),  # which of the three?
        ("NVIDIA H1000", "bf16"),
        ("NVIDIA A10G", "bf16"),
        ("NVIDIA A1000", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
        ("NVIDIA GB300", "fp32"),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16"),
        ("GRID A100-20C", "bf16"),
        ("NVIDIA A10-24Q", "bf16"),
        ("Tesla V100-SXM2-32GB", "bf16"),
        ("NVIDIA H200", "fp8"),
    ],
)
def test_unknown_peaks_are_none(name: str, precision: str) -> None:
    assert peak_flops(name, precision) is None


def test_utilization_needs_a_peak() -> None:
    assert model_flops_utilization(4e14, 1e15) == pytest.approx(0.4)
    assert model_flops_utilization(4e14, None) is None


def test_rates() -> None:
    assert tokens_per_second(1000, 4) == 250
    with pytest.raises(ValueError, match="> 0 s, got 0"):
        tokens_per_second(1000, 0)
    record = throughput_record(tokens=8000, flops=4e15, seconds=2.0, num_devices=4, peak=1e15)
    assert record == {
        "tokens_per_second": 4000.0,
        "tokens_per_second_per_device": 1000.0,
        "tflops_per_device": 500.0,
        "mfu": 0.5,
    }
    assert throughput_record(1, 1.0, 1.0, 1, None)["mfu"] is None


def test_eta_forgets_the_warm_up_and_follows_a_change() -> None:
    eta = EtaEstimator(memory_steps=10)
    assert eta.remaining_s(5) is None
    assert eta.step_time_s is None
    eta.update(100.0)  # the first step compiles, allocates, reads caches
    assert eta.remaining_s(2) == 200.0
    eta.update(2.0, steps=2)
    assert eta.remaining_s(7) == 7.0
    for _ in range(100):
        eta.update(3.0)
    assert eta.step_time_s == pytest.approx(3.0, abs=1e-3)
    assert eta.remaining_s(0) == 0.0
    assert eta.remaining_s(-4) == 0.0


def test_eta_weighs_steps_not_observations() -> None:
    together, alone = EtaEstimator(10), EtaEstimator(10)
    for estimator in (together, alone):
        estimator.update(1.0)
        estimator.update(1.0)
    together.update(8.0, steps=4)
    for _ in range(4):
        alone.update(2.0)
    assert together.step_time_s == pytest.approx(alone.step_time_s)
    assert 1.0 < together.step_time_s < 2.0


def test_eta_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        EtaEstimator().update(1.0, steps=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        EtaEstimator(memory_steps=0)
