"""tools/evaluate.py as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sgt.export.forms import FORMS
from tests.helpers import grown_run
from tests.helpers.commands import run_here, snapshot

SCRIPT = "tools/evaluate.py"


def test_a_checkpoint_and_its_export_measure_the_same(tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    own = run_here(SCRIPT, [str(grown_run.checkpoints()), "--json"], tmp_path)
    assert (own.code, own.err) == (0, "")
    checkpoint = json.loads(own.out)["data"]
    assert checkpoint["loss_with_padding"] == pytest.approx(grown_run.validation_losses()[18], abs=1e-5)
    options = [
        "--data",
        grown_run.data_prefix(),
        "--part",
        "valid",
        "--split",
        "90,10,0",
        "--samples",
        "8",
        "--json",
    ]
    for form in FORMS.values():
        export = json.loads(run_here(SCRIPT, [str(grown_run.export(form)), *options], tmp_path).out)["data"]
        for name in ("loss", "perplexity", "bits_per_byte"):
            assert export[name] == pytest.approx(checkpoint[name], abs=1e-5)
    assert snapshot(tmp_path) == before


def test_the_report_is_short(tmp_path: Path) -> None:
    done = run_here(SCRIPT, [str(grown_run.checkpoints()), "--samples", "2", "--batch-size", "1"], tmp_path)
    assert done.code == 0
    heads = [line.split()[0] for line in done.out.splitlines()[1:]]
    assert heads == ["data", "tokens", "loss", "perplexity", "bits/byte", "with"]


def test_a_set_of_the_run_by_name(tmp_path: Path) -> None:
    """Of a run without one; ``tests/engine/test_live_tasks.py`` has one."""
    done = run_here(SCRIPT, [str(grown_run.checkpoints()), "--valid-set", "wiki"], tmp_path)
    assert done.code == 2 and "has no validation set 'wiki' (data.valid: none); give --data PREFIX" in done.err
    both = run_here(SCRIPT, ["x", "--valid-set", "wiki", "--part", "valid"], tmp_path)
    assert both.code == 2 and "--valid-set names the data and its part" in both.err
