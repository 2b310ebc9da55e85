"""Poisons the gradients of a micro-batch that met something not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_sgt.model.entropy_meter import EntropyMeter


def guard(output: Tensor, meter: EntropyMeter) -> None:
    """Multiply the gradient of ``output`` by NaN when it or an entropy stored in its forward pass is not finite.

    ``output`` is the loss of a micro-batch or, in a pipeline, what a chunk hands on. The gradients are NaN then, and
    every rank skips the step as for any gradient that is not finite: the decision costs neither a collective of its
    own nor a wait for the device.
    """
    finite = meter.is_finite()
    if output.dim() == 0:  # one that is handed on and not finite makes the loss so
        finite = finite & output.detach().isfinite()
    factor = torch.where(finite, 1.0, math.nan).to(output.dtype)
    output.register_hook(lambda gradient: gradient * factor)
