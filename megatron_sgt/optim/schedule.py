"""Learning-rate schedules: pure functions of the optimizer step."""

from __future__ import annotations

import math

from megatron_sgt.config.optim import OptimConfig


def learning_rate(step: int, config: OptimConfig, train_iters: int) -> float:
    """Learning rate of optimizer step ``step``, counted from 1.

    Warm-up is linear, step 1 having lr / lr_warmup_iters (not 0). After it, with r in [0, 1] the share of the
    decay that has passed:

    * constant: lr;
    * linear:   min_lr + (lr - min_lr) (1 - r);
    * cosine:   min_lr + (lr - min_lr) (1 + cos πr) / 2;
    * WSD:      lr, then linear to min_lr over the last lr_wsd_decay_iters steps before lr_decay_iters.

    Past lr_decay_iters (default train_iters) it stays at min_lr, except for constant.
    """
    peak, floor = config.lr, config.min_lr
    if step <= config.lr_warmup_iters:
        return peak * step / config.lr_warmup_iters
    if config.lr_decay_style == "constant":
        return peak
    end = config.lr_decay_iters or train_iters
    start = config.lr_warmup_iters
    if config.lr_decay_style == "WSD":
        start = max(start, end - (config.lr_wsd_decay_iters or 0))
    ratio = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    if config.lr_decay_style == "cosine":
        return floor + (peak - floor) * (1.0 + math.cos(math.pi * ratio)) / 2.0
    return floor + (peak - floor) * (1.0 - ratio)
