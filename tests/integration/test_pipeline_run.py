"""A whole run in a pipeline: trains, grows, validates, averages and ends as the run of one process does."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import measured_steps, pretrain, reported, tiny_config, write_tiny_data


def decision(event: dict[str, Any]) -> list[Any]:
    """A growth event without the measured entropies, which differ in their last digits."""
    return [event[name] for name in ("step", "action", "layer", "phase", "kept_heads", "loop_depth")]


def test_a_run_of_two_stages_is_that_of_one_process(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)
    folders = []
    for stages in (1, 2):
        config = tiny_config(
            tmp_path / str(stages),
            data,
            parallel={"pipeline_model_parallel_size": stages},
            train={"train_iters": 12, "ema_decay": 0.9, "eval_iters": 2},
        )
        folders.append(Path(config.logging.run_dir))
        run_on_ranks(stages, pretrain, config, backend="gloo")
    one, two = (measured_steps(folder) for folder in folders)
    assert [record["step"] for record in two] == list(range(1, 13))
    for expected, found in zip(one, two, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    alone, piped = ([decision(event) for event in reported(folder, "growth")] for folder in folders)
    assert alone == piped and len(alone) > 1
    alone, piped = (reported(folder, "valid") for folder in folders)
    assert len(alone) == len(piped) > 1
    for expected, found in zip(alone, piped, strict=True):
        for loss in ("loss", "ema_loss"):
            assert found[loss] == pytest.approx(expected[loss], abs=1e-5)
