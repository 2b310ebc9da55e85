"""Lines that a parser of Megatron-LM's log understands."""

import math
import re
from typing import Any

from megatron_sgt.metrics import megatron_lines

RECORD: dict[str, Any] = {
    "step": 100,
    "train_iters": 1000,
    "consumed_samples": 3200,
    "step_time_s": 1.23456,
    "lr": 6e-4,
    "global_batch_size": 32,
    "loss": 6.0,
    "loss_scale": 1.0,
    "grad_norm": 0.7144,
    "skipped_steps": 0,
    "nan_steps": 0,
}


def test_train_line() -> None:
    assert megatron_lines.train_line(RECORD) == (
        " iteration      100/    1000 | consumed samples:         3200 | "
        "elapsed time per iteration (ms): 1234.6 | learning rate: 6.000000E-04 | global batch size:    32 | "
        "lm loss: 6.000000E+00 | loss scale: 1.0 | grad norm: 0.714 | "
        "number of skipped iterations:   0 | number of nan iterations:   0 |"
    )


def test_train_line_has_the_stamp_and_throughput_of_newer_logs() -> None:
    line = megatron_lines.train_line({**RECORD, "time": 1.7e9, "tflops_per_device": 418.23})
    assert re.match(r" \[2023-11-1[45] \d\d:\d\d:20\] iteration      100/    1000 \|", line)
    assert "| throughput per GPU (TFLOP/s/GPU): 418.2 |" in line


def test_a_nan_loss_stays_in_the_line() -> None:
    line = megatron_lines.train_line({**RECORD, "loss": math.nan, "skipped_steps": 2, "nan_steps": 1})
    assert "| lm loss: NAN |" in line
    assert "| number of skipped iterations:   2 | number of nan iterations:   1 |" in line
    painted = megatron_lines.train_line({**RECORD, "loss": math.inf}, lambda role, text: f"<{role}{text}>")
    assert "<bad lm loss: INF |>" in painted


def test_valid_and_save_lines() -> None:
    rule, text, same_rule = megatron_lines.valid_line({"step": 100, "loss": 6.0, "perplexity": 403.4}).split("\n")
    assert text == (" validation loss at iteration 100 | lm loss value: 6.000000E+00 | lm loss PPL: 4.034000E+02 |")
    assert rule == same_rule == "-" * (len(text) + 1)
    averaged = megatron_lines.valid_line({"step": 1, "loss": 6.0, "ema_loss": 5.0, "ema_perplexity": 148.4})
    assert " | ema lm loss value: 5.000000E+00 | ema lm loss PPL: 1.484000E+02 |" in averaged
    named = {"step": 1, "sets": {"wiki": {"loss": 6.0, "perplexity": 403.4}}}
    assert megatron_lines.valid_line(named).split("\n")[1] == text.replace("iteration 100", "iteration 1 on wiki")
    saved = megatron_lines.save_line({"step": 100, "path": "runs/x"})
    assert saved == "  successfully saved checkpoint from iteration     100 to runs/x"
