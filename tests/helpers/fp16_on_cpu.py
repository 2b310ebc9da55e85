"""Lets a rank of a test run fp16 on its CPU: torch can, this project and DeepSpeed refuse it there as far too slow.

What is executed is what a GPU executes above torch's operators: DeepSpeed's optimizers, its loss scaler, the engine.
"""

from __future__ import annotations

from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from megatron_sgt.config import Config


def allow_fp16() -> None:
    """For the rest of this process (``run_on_ranks`` gives every case new ones)."""
    CPU_Accelerator.is_fp16_supported = lambda self: True
    Config.precision_on = lambda self, device: self.train.precision  # type: ignore[assignment,return-value]
