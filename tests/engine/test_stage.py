"""A stage that was closed is gone, whatever it has done; the next one trains in its place."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_sgt.config import Config
from megatron_sgt.engine import session
from megatron_sgt.engine.hooks.base import Hook, RunParts
from megatron_sgt.engine.run import PretrainingRun
from megatron_sgt.engine.start import find_together, own_look
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.launch.rank_info import RankInfo
from tests.helpers.exhaustive import exhaustive
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import tiny_config, write_tiny_data

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {"zero_stage": 0}),
    "zero_1": (2, {"zero_stage": 1}),
    "zero_3_balanced": (2, {"zero_stage": 3, "tensor_model_parallel_size": 2, "loop_method": "balanced"}),
}


class Keeper(Hook):
    """A user's hook that keeps its parts, as they are given to it, and has no state before."""

    name = "keeper"

    def attach(self, parts: RunParts) -> None:
        self.parts = parts
        self.layers = [parts.config.model.num_layers]

    def after_step(self, state: TrainState, result: StepResult) -> None:
        self.layers = []

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layers = state["layers"]


def tensors() -> int:
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())


def rebuilt(
    info: RankInfo, config: Config, rebuilds: int
) -> tuple[list[bool], list[int], list[int], bool, dict[str, Any]]:
    """By rebuild: whether the old engine or model lives, and the number of tensors; then loops, and the last step.

    Last, the states that checkpoints without them are given.
    """
    run = PretrainingRun(config, info, hooks=[Keeper()])
    alive, counts, look = [], [], own_look(run)
    for _ in range(rebuilds):
        run._train_to(run.state.step + 3)
        old = [weakref.ref(part) for part in (run.runtime.engine, run.runtime.model, run.runtime.engine.optimizer)]
        with mock.patch.object(session, "tokenizer_fingerprint", side_effect=OSError("its file was moved")):
            run._replace(run.stage.stage)
        alive.append(any(one() is not None for one in old))
        run._load(find_together(look, run), look)
        counts.append(tensors())
    trained = run.state.step == 3 * rebuilds
    return alive, counts, list(run.schedule.plan.loops), trained, dict(run.stage.saver.at_first)


CASES = [("alone", 3), ("zero_3_balanced", 3), *(exhaustive((layout, 5)) for layout in LAYOUTS)]
"""Layout, rebuilds."""


@pytest.mark.parametrize(("layout", "rebuilds"), CASES)
def test_nothing_of_an_old_stage_stays(layout: str, rebuilds: int, tmp_path: Path) -> None:
    ranks, parallel = LAYOUTS[layout]
    config = tiny_config(
        tmp_path,
        write_tiny_data(tmp_path),
        model={"num_layers": 3},
        parallel=parallel,
        growth={"first_selection_step": 1, "window_size": 1, "top_k_layers": 2},  # sparse loops from step 2 on
        train={"train_iters": 60, "ema_decay": 0.5, "eval_interval": 2},
        checkpoint={"async_save": layout == "zero_1", "keep_last": 1},
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}} if parallel["zero_stage"] else {},
    )
    for alive, counts, loops, trained, at_first in run_on_ranks(ranks, rebuilt, config, rebuilds):
        assert alive == [False] * rebuilds
        # The first rebuild's number may be without what is kept once per process.
        assert len(set(counts[1:])) == 1, counts
        assert sum(map(bool, loops)) == 2 and trained
        assert at_first == {"keeper": {"layers": [3]}}, "of the first attach, not of a later one"
