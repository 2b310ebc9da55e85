"""The supernet of a search: the same losses under every layout, the checkpoint's own loops, its average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_sgt.arch.weights import weights
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, WEIGHTS
from megatron_sgt.checkpoint.surgery.reader import GrownReader, open_any
from megatron_sgt.config import Config
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.engine import stage_search
from megatron_sgt.engine.build import start_processes
from megatron_sgt.engine.stage_search import StageSearch, check_cut, inherited_plan, recorded_policies, supernet_config
from megatron_sgt.errors import ConfigError, DataError
from megatron_sgt.growth import LayerPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.optim.schedule import learning_rate, rate_after, rate_of_run
from megatron_sgt.stages.search import supernet
from megatron_sgt.stages.stages import stages_of
from tests.helpers.checkpoints import grown_config, write_grown_checkpoint
from tests.helpers.commands import snapshot
from tests.helpers.deepspeed_files import random_state, write_checkpoint
from tests.helpers.exhaustive import exhaustive
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import tiny_config, write_tiny_data
from tests.helpers.single import single_groups, small_config

STEPS = 6
DEPTHS = (2, 3, 4)
Layout = tuple[int, int, int]
"""Tensor-parallel size, pipeline stages, ZeRO stage."""
LAYOUTS: tuple[Layout, ...] = ((1, 1, 1), (1, 1, 3), (2, 1, 1), (1, 2, 1))
"""On two ranks."""


def config_at(folder: Path, layout: Layout = LAYOUTS[0], **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 2},
        "growth": {"method": "vanilla"},
        "train": {"ema_decay": 0.75, "eval_iters": 2},
        "parallel": {
            "device": "cpu",
            "tensor_model_parallel_size": layout[0],
            "pipeline_model_parallel_size": layout[1],
            "zero_stage": layout[2],
        },
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return tiny_config(folder / "run", str(folder / "walks"), **merged)


def search(info: RankInfo, folder: Path, checkpoint: Path, layouts: tuple[Layout, ...]) -> list[Any]:
    """Under each layout what was measured, and every measurement told."""
    found = []
    for layout in layouts:
        config = config_at(folder, layout)
        groups = start_processes(config, info)
        searching = StageSearch(checkpoint, config, supernet(config.model, DEPTHS), DEPTHS, groups)
        told: dict[int, dict[int, float]] = {}
        measured = searching.run(STEPS, told.__setitem__)
        found.append((searching.averaged, searching.step, measured, told))
        parallel_state.destroy_model_parallel()
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    write_tiny_data(folder)
    config = config_at(folder)
    state = random_state(config, averaged=True)
    small = {q: {name: 0.3 * tensor for name, tensor in values.items()} for q, values in state.items()}
    return write_checkpoint(folder / "from", config, small, (1, 1, 1))


@pytest.mark.parametrize("layouts", [LAYOUTS[1:], exhaustive((LAYOUTS,))], ids=["a share", "all"])
def test_all_ranks_of_every_layout_find_the_same(checkpoint: Path, layouts: tuple[Layout, ...]) -> None:
    folder = checkpoint.parent.parent
    before = snapshot(checkpoint)
    (alone,) = run_on_ranks(1, search, folder, checkpoint, LAYOUTS[:1])[0]
    averaged, step, measured, told = alone
    assert averaged and step == 7 and list(told) == [4, 5, 6]
    for depth in DEPTHS:
        assert measured.losses[depth] == pytest.approx(sum(losses[depth] for losses in told.values()) / 3)
        assert measured.seconds[depth] > 0
    assert len({round(loss, 3) for loss in measured.losses.values()}) == 3  # they are different models
    for ranks in run_on_ranks(2, search, folder, checkpoint, layouts, backend="gloo"):
        for _, _, found, _ in ranks:
            assert found.losses == pytest.approx(measured.losses, abs=2e-5)
    assert snapshot(checkpoint) == before


def test_the_supernet_is_made_of_the_average(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint.parent.parent
    loaded: list[GrownReader] = []
    monkeypatch.setattr(stage_search, "load_into_engine", lambda reader, *_: loaded.append(reader))
    config = config_at(folder)
    groups = single_groups(config)
    StageSearch(checkpoint, config, supernet(config.model, DEPTHS), DEPTHS, groups)
    whole = open_any(checkpoint).tensors
    first = weights(config.model)[0]
    found, averaged, trained = (
        next(iter(tensors.whole(first, quantity).values()))
        for tensors, quantity in ((loaded[0], WEIGHTS), (whole, AVERAGE), (whole, WEIGHTS))
    )
    assert torch.equal(found, averaged) and not torch.equal(found, trained)


def test_layers_go_on_looping_in_the_supernet(tmp_path: Path) -> None:
    """Layers 3 and 1 of 4 loop; layer 1 stands inside a window, whose fading heads take no part."""
    opened = open_any(write_grown_checkpoint(tmp_path, (1, 1, 1)))
    config = grown_config()
    growth = supernet(config.model, (4, 6, 8))
    plan = inherited_plan(opened, config, supernet_config(config, growth, 7), growth)
    assert plan.num_layers == 8
    assert dict(plan.layers) == {2: LayerPlan(1, (1, 2)), 6: LayerPlan(2, (0, 3))}


def test_the_learning_rate_goes_on_as_the_run_does() -> None:
    """Through the policies of all stages that the checkpoint has behind it, which its own configuration lacks."""
    deeper = {"operator": "midas", "options": {"block_size": 1}}
    stages = [
        {"until_steps": 8, "lr_policy": "rewind(3)", **deeper},
        {"until_steps": 10, "lr_policy": "rewarm(4)", **deeper},
    ]
    run = stages_of(small_config(growth={"method": "vanilla", "stages": stages}, train={"train_iters": 20}))
    saved = {"trainer": {"step": 11}, "stages": [stage.record() for stage in run[1:]]}
    found = [rate_after(step, recorded_policies(saved), run[-1].config) for step in range(12, 21)]
    assert found == [rate_of_run(step, run) for step in range(12, 21)]
    assert found != [learning_rate(step, run[-1].config.optim, 20) for step in range(12, 21)]
    assert recorded_policies({"trainer": {"step": 11}}) == ()


def test_a_cut_in_which_a_candidate_skips_all_of_a_part_is_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0 0 1 1 one each at depth 2. The outer parts, which may be skipped, have weights besides their layers."""
    config = config_at(checkpoint.parent.parent)
    growth = supernet(config.model, DEPTHS)
    for counts in ((1, 3), (1, 2, 1), (3, 1)):
        check_cut(PipelineLayout(len(counts), counts), growth, DEPTHS)
    monkeypatch.setattr(stage_search, "pipeline_layout", lambda config: PipelineLayout(2, (1, 1, 1, 1)))
    says = "cut as 1,1,1,1, part [12] of the supernet holds layer [12] alone, .* of 2 layers skips; use fewer pipeline"
    with pytest.raises(ConfigError, match=says):
        StageSearch(checkpoint, config, growth, DEPTHS, single_groups(config))


def without_validation(info: RankInfo, folder: Path, checkpoint: Path) -> None:
    config = config_at(folder, data={"split": "1"}, train={"eval_interval": 0})
    groups = start_processes(config, info)
    StageSearch(checkpoint, config, supernet(config.model, DEPTHS), DEPTHS, groups)


def test_without_validation_data_nothing_is_trained(checkpoint: Path) -> None:
    with pytest.raises(DataError, match=r"data\.split: 1 leaves no validation samples"):
        run_on_ranks(1, without_validation, checkpoint.parent.parent, checkpoint)
