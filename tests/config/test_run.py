"""Bounds and defaults of the sections of the run itself."""

from typing import Any

import pytest
from pydantic import ValidationError

from megatron_sgt.config import CheckpointConfig, LoggingConfig, TrainConfig
from megatron_sgt.config.base import Section
from tests.helpers.single import small_config

TRAIN: dict[str, Any] = {"train_iters": 10, "micro_batch_size": 1, "global_batch_size": 1}


@pytest.mark.parametrize(
    ("section", "given", "field"),
    [
        (TrainConfig, {**TRAIN, "train_iters": 0}, "train_iters"),
        (TrainConfig, {**TRAIN, "micro_batch_size": 0}, "micro_batch_size"),
        (TrainConfig, {**TRAIN, "precision": "fp8"}, "precision"),
        (TrainConfig, {**TRAIN, "exit_interval": 0}, "exit_interval"),
        (TrainConfig, {**TRAIN, "recompute_granularity": "some"}, "recompute_granularity"),
        (TrainConfig, {**TRAIN, "ema_decay": 1.0}, "ema_decay"),
        (TrainConfig, {**TRAIN, "ema_decay": -0.1}, "ema_decay"),
        (TrainConfig, {"train_iters": 1, "micro_batch_size": 1}, "global_batch_size"),
        (CheckpointConfig, {"keep_last": -1}, "keep_last"),
        (CheckpointConfig, {"resume": "always"}, "resume"),
        (LoggingConfig, {"run_dir": ""}, "run_dir"),
        (LoggingConfig, {"log_interval": 0}, "log_interval"),
        (LoggingConfig, {"style": "neox"}, "style"),
    ],
)
def test_bounds(section: type[Section], given: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        section(**given)
    assert [error["loc"] for error in caught.value.errors()] == [(field,)]


def test_an_average_of_weights_that_are_in_files_is_refused() -> None:
    def problems(zero: Any) -> list[str]:
        values = small_config(train={"ema_decay": 0.999}).model_copy(update={"deepspeed": {"zero_optimization": zero}})
        return [problem for problem in values.problems() if "ema_decay" in problem or "must be a mapping" in problem]

    assert problems({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}) == [
        "train.ema_decay: 0.999 needs the fp32 weights in memory; set "
        "deepspeed.zero_optimization.offload_optimizer.device to cpu instead of nvme, or ema_decay to 0"
    ]
    assert problems({"offload_optimizer": {"device": "cpu"}}) == problems({"offload_optimizer": "nvme"}) == []
    assert problems("nvme") == ["deepspeed.zero_optimization: must be a mapping, got 'nvme'"]


def test_a_new_run_saves_at_its_end_and_continues_if_it_can() -> None:
    checkpoint = CheckpointConfig()
    assert (checkpoint.save_interval, checkpoint.resume, checkpoint.load, checkpoint.keep_last) == (
        0,
        "auto",
        None,
        3,
    )
