"""Runs of three stages against plain PyTorch: every method of growth, under every layout, step by step."""

from __future__ import annotations

from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout
from tests.helpers import staged
from tests.helpers.exhaustive import share_of
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, write_tiny_data
from tests.helpers.staged import FIRST, LAST, METHODS, SECOND, by_reference, staged_config

PRESERVED = 1e-6
"""Between the losses before and after a growth that preserves the function, in fp32."""
LOSS, NORM = 3e-5, 1e-5
"""Absolute and relative; in fact both are below 1e-6."""
LAYOUTS = [(tp_size, zero) for tp_size in (1, 2) for zero in (0, 1, 3)]
EVERY = [(method, *layout) for method, layout in product(METHODS, LAYOUTS)]
SHARED = ["g_stack", "midas", "lidas", "msg_hidden", "msg_all", "msg_ramp", "compound_grow", "auto_prog_ema"]
SHARE = [(method, *LAYOUTS[number % len(LAYOUTS)]) for number, method in enumerate(SHARED)]
"""Every layout, and every operator but grad_stack, whose layers are in tests/stages/test_growth.py."""


def layout_of(tp_size: int, zero: int) -> dict[str, dict[str, Any]]:
    """Two ranks, two micro-batches on each; ZeRO is kept where there is one data-parallel rank."""
    return {
        "parallel": {"tensor_model_parallel_size": tp_size, "zero_stage": zero, "device": "cpu"},
        "deepspeed": {"zero_optimization": {"stage": zero, "stage3_param_persistence_threshold": 0}} if zero else {},
        "train": {"micro_batch_size": tp_size},
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("method", "tp_size", "zero"), share_of(EVERY, SHARE))
def test_three_stages_are_those_of_plain_pytorch(
    method: str, tp_size: int, zero: int, data: str, tmp_path: Path
) -> None:
    config = staged_config(tmp_path, data, method, **layout_of(tp_size, zero))
    assert config.num_micro_batches(2) == 2
    run_on_ranks(2, pretrain, config)
    found, expected = measured_steps(tmp_path), by_reference(data, method)
    assert [step["step"] for step in found] == list(range(1, len(expected) + 1))
    for step, (loss, norm, rate) in zip(found, expected, strict=True):
        assert step["lr"] == pytest.approx(rate, rel=1e-12), step["step"]
        assert step["loss"] == pytest.approx(loss, abs=LOSS), step["step"]
        assert step["grad_norm"] == pytest.approx(norm, rel=NORM), step["step"]
    boundaries = reported(tmp_path, "grow")
    assert [record["step"] for record in boundaries] == [FIRST, SECOND]
    for record in boundaries:
        gap = abs(record["probe_loss_before"] - record["probe_loss_after"])
        assert gap <= PRESERVED if record["preserves"] else gap > 1e-3
    kept = [layout.step_of(tag) for tag in layout.finished_tags(config.save_dir)]
    assert kept == [FIRST, SECOND, LAST], "without an interval, what the model grows from is saved and kept"


@pytest.mark.parametrize(
    ("method", "setting", "value"),
    [
        ("midas", "moments", "fresh"),
        ("msg_hidden", "moments", "copy"),
        ("msg_ffn", "moments", "seeded"),
        ("compound_grow", "moments", "copy"),
        ("grad_stack", "optimizer", "rewind(1)"),
        ("g_stack", "moments", "copy"),
        ("g_stack", "lr_policy", "continue"),
        ("auto_prog_ema", "weights", "weights"),
    ],
)
def test_another_rule_would_be_seen(
    method: str, setting: str, value: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = deepcopy(METHODS[method])
    other[0][setting] = value
    other[0] |= {"optimizer": "continue"} if value == "copy" and method == "g_stack" else {}
    monkeypatch.setitem(staged.METHODS, f"{method} otherwise", other)
    monkeypatch.setattr(staged, "ema_decay_of", lambda name: staged.EMA_DECAY if "_ema" in name else 0.0)
    expected, found = by_reference(data, method), by_reference.__wrapped__(data, f"{method} otherwise")
    assert found[: staged.FIRST] == expected[: staged.FIRST]
    gaps = [max(abs(a[0] - b[0]) / LOSS, abs(a[1] / b[1] - 1) / NORM) for a, b in zip(found, expected, strict=True)]
    assert max(gaps) > 10
