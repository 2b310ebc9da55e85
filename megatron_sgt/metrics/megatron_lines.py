"""The lines of Megatron-LM's training log, so that programs which parse that log keep working.

The fields, their order and their number formats are those of ``training_log`` and
``evaluate_and_print_results`` in Megatron-LM's megatron/training/training.py. One thing differs on purpose:
Megatron leaves a loss out of the line unless it is a positive number, here it is always printed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from megatron_sgt.metrics.lines import Paint, plain


def _field(record: Mapping[str, Any], key: str, template: str, scale: float = 1) -> str:
    value = record.get(key)
    return "" if value is None else " " + template.format(value * scale) + " |"


def train_line(record: Mapping[str, Any], paint: Paint = plain) -> str:
    """One training line. ``time`` (seconds since the epoch), if the record has it, is the leading stamp."""
    when = record.get("time")
    stamp = "" if when is None else f" [{datetime.fromtimestamp(when):%Y-%m-%d %H:%M:%S}]"
    loss = record.get("loss")
    total = record.get("train_iters") or 0
    loss_text = _field(record, "loss", "lm loss: {:.6E}")
    if loss is not None and not math.isfinite(loss):
        loss_text = paint("bad", loss_text)
    return "".join(
        (
            f"{stamp} iteration {record['step']:8d}/{total:8d} |",
            _field(record, "consumed_samples", "consumed samples: {:12d}"),
            _field(record, "step_time_s", "elapsed time per iteration (ms): {:.1f}", 1000.0),
            _field(record, "tflops_per_device", "throughput per GPU (TFLOP/s/GPU): {:.1f}"),
            _field(record, "lr", "learning rate: {:.6E}"),
            _field(record, "global_batch_size", "global batch size: {:5d}"),
            loss_text,
            _field(record, "loss_scale", "loss scale: {:.1f}"),
            _field(record, "grad_norm", "grad norm: {:.3f}"),
            f" number of skipped iterations: {record.get('skipped_steps') or 0:3d} |",
            f" number of nan iterations: {record.get('nan_steps') or 0:3d} |",
        )
    )


def valid_line(record: Mapping[str, Any], paint: Paint = plain) -> str:
    """The result of a validation, between two rules; one line for each set."""
    sets = record.get("sets") or {}
    found = [] if sets and record.get("loss") is None else [("", record)]
    texts = [_valid_text(record["step"], label, one) for label, one in [*found, *_labelled(sets)]]
    rule = "-" * (max(map(len, texts)) + 1)
    return "\n".join((rule, *texts, rule))


def _labelled(sets: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(f" on {name}", one) for name, one in sets.items()]


def _valid_text(step: int, label: str, record: Mapping[str, Any]) -> str:
    text = f" validation loss at iteration {step}{label} |"
    text += _field(record, "loss", "lm loss value: {:.6E}")
    text += _field(record, "perplexity", "lm loss PPL: {:.6E}")
    text += _field(record, "ema_loss", "ema lm loss value: {:.6E}")
    return text + _field(record, "ema_perplexity", "ema lm loss PPL: {:.6E}")


def save_line(record: Mapping[str, Any], paint: Paint = plain) -> str:
    """A checkpoint that is complete on disk."""
    return f"  successfully saved checkpoint from iteration {record['step']:7d} to {record.get('path')}"
