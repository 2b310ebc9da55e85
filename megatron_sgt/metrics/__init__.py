"""What a run reports: console lines, JSON lines, TensorBoard, Weights & Biases, throughput. No torch here.

A report is a kind and a record; records.py has the fields of every kind. Only rank 0 has writers; the hub of every
other rank is empty.
"""

from megatron_sgt.metrics.console import ConsoleWriter
from megatron_sgt.metrics.hub import METRICS_FILE, MetricsHub, build_hub
from megatron_sgt.metrics.throughput import EtaEstimator, peak_flops, throughput_record
from megatron_sgt.metrics.writers import TensorBoardWriter, WandbWriter, Writer

__all__ = [
    "METRICS_FILE",
    "ConsoleWriter",
    "EtaEstimator",
    "MetricsHub",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
    "build_hub",
    "peak_flops",
    "throughput_record",
]
