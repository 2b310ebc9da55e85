"""Ways to grow: the same final model, and the FLOPs of the run from scratch, over all stages."""

from __future__ import annotations

from functools import cache

import pytest
from study_parts.contenders import Contender
from study_parts.growing import GROWING, METHODS, run_flops

from megatron_sgt.config import Config, load_config
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.stages.stages import Stage, stages_of
from tests.helpers.commands import ROOT


def load(preset: str, settings: tuple[str, ...], *more: str) -> Config:
    """Of the study's own file; its vocabulary is that of the quickstart's tokenizer."""
    file = ROOT / "examples/configs/study_growing.yaml"
    return load_config(file, ["model.vocab_size=2048", *more, *settings], preset)


@cache
def contender(name: str) -> tuple[Contender, tuple[Stage, ...]]:
    (found,) = GROWING.contenders(load, (name,))
    return found, stages_of(load(found.preset, found.settings))


@pytest.mark.parametrize("name", METHODS)
def test_all_runs_cost_the_same_and_end_with_the_same_model(name: str) -> None:
    found, stages = contender(name)
    final = load("vanilla", ())
    assert stages[-1].config.model == final.model
    config = load(found.preset, found.settings)
    assert run_flops(config) == pytest.approx(run_flops(final), rel=0.01)
    if found.preset == "vanilla":  # by hand
        cost = sum(
            (s.last - s.first)
            * step_flops(
                s.config.model, LoopPlan.empty(s.config.model.num_layers), config.train.global_batch_size
            ).model
            for s in stages
        )
        assert run_flops(config) == cost
        assert (stages[-1].last > final.train.train_iters) == (name != "scratch")


def test_stages_are_those_of_the_sources() -> None:
    shapes = {
        name: [(s.config.model.num_layers, s.config.model.ffn_hidden_size) for s in contender(name)[1]]
        for name in METHODS
    }
    assert shapes["g_stack-2"] == shapes["sgt+g_stack-2"] == [(4, 192), (8, 192)]
    assert shapes["g_stack-4"] == [(2, 192), (8, 192)]
    assert shapes["midas"] == [(2, 192), (4, 192), (6, 192), (8, 192)]
    assert shapes["msg-ffn"] == [(8, 48), (8, 192)]
    for name, shares in {"g_stack-4": [0.1], "midas": [1 / 30, 5 / 30, 14 / 30], "msg-ffn": [0.25]}.items():
        stages = contender(name)[1]
        assert [s.last / stages[-1].last for s in stages[:-1]] == pytest.approx(shares, abs=0.003)
    assert contender("midas")[0].about.startswith("2 layers: ") and "192 units: " in contender("msg-ffn")[0].about


@pytest.mark.parametrize(
    ("names", "steps", "message"),
    [
        (("midas",), 20, r"train\.train_iters: 20 are too few: midas comes no nearer to their FLOPs than -1\.2%; take"),
        (("gstack",), 200, "no way to grow is called gstack: choose from scratch, g_stack-2, "),
    ],
)
def test_what_cannot_be_compared_is_refused(names: tuple[str, ...], steps: int, message: str) -> None:
    settings = f"train.train_iters={steps}", f"train.eval_interval={steps}"
    with pytest.raises(ConfigError, match=message):
        GROWING.contenders(lambda preset, more: load(preset, more, *settings), names)
