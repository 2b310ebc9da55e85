"""Runs of equal FLOPs: the same final model, planned over all stages, within 1 %."""

from __future__ import annotations

from functools import cache

import pytest
from study_parts.contenders import GROWING, Contender
from study_parts.equal_flops import run_flops, settings_of, stages_line

from megatron_sgt.config import Config, load_config
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.flops import step_flops
from megatron_sgt.stages.presets import preset_named
from megatron_sgt.stages.stages import Stage, stages_of
from tests.helpers.commands import ROOT


def load(preset: str, settings: tuple[str, ...] = ()) -> Config:
    """Of the study's own file; its vocabulary is that of the quickstart's tokenizer."""
    file = ROOT / "examples/configs/study_growing.yaml"
    return load_config(file, ["model.vocab_size=2048", *settings], preset_named(preset))


@cache
def contender(preset: str) -> tuple[Contender, Config, tuple[Stage, ...]]:
    (found,) = GROWING.contenders(load, (preset,))
    config = load(preset, found.settings)
    return found, config, stages_of(config)


@pytest.mark.parametrize("preset", GROWING.presets)
def test_all_runs_cost_the_same_and_end_with_the_same_model(preset: str) -> None:
    _, config, stages = contender(preset)
    final = load("vanilla")
    assert stages[-1].config.model == final.model
    assert run_flops(config) == pytest.approx(run_flops(final), rel=0.01)
    assert config.train.eval_interval == config.train.train_iters == stages[-1].last
    assert (stages[-1].last == final.train.train_iters) == (preset == "vanilla")
    if not preset.startswith("sgt"):  # by hand
        batch = config.train.global_batch_size
        plain = [(s, LoopPlan.empty(s.config.model.num_layers)) for s in stages]
        cost = sum((s.last - s.first) * step_flops(s.config.model, plan, batch).model for s, plan in plain)
        assert run_flops(config) == cost


def test_the_table_says_what_is_trained() -> None:
    assert contender("vanilla")[0].trains == "8 layers: 150"
    for preset, units in (("g-stack-4", ["2 layers", "8 layers"]), ("msg-ffn", ["48 units", "192 units"])):
        found, _, stages = contender(preset)
        steps = [stage.last - stage.first for stage in stages]
        assert found.trains == ", ".join(f"{unit}: {count}" for unit, count in zip(units, steps, strict=True))
    assert stages_line(contender("midas")[1]).count(" layers: ") == len(contender("midas")[2]) > 2
    assert stages_line(load("compound-grow")) == (
        "4 layers / 48 units: 50, 8 layers / 48 units: 50, 8 layers / 192 units: 50"
    )
    first, *_, last = stages_line(load("msg")).split(", ")
    assert first == "2 layers / 32 channels / 48 units / 2 heads: 15"
    assert last == "8 layers / 64 channels / 192 units / 4 heads: 75"
    grouped = stages_line(load("msg", ("model.num_query_groups=2",)))
    assert grouped.startswith("2 layers / 32 channels / 48 units / 2 heads / 1 key/value heads: 15, ")


def test_a_decay_that_does_not_stretch_is_refused() -> None:
    fixed = load("vanilla", ("optim.lr_decay_iters=150",))
    with pytest.raises(ConfigError, match=r"optim\.lr_decay_iters 150: runs of equal FLOPs have different lengths"):
        settings_of(lambda settings: load("g-stack-2", settings), fixed, "g-stack-2")


def test_a_run_that_is_too_short_is_refused() -> None:
    short = load("vanilla", ("train.train_iters=16", "train.eval_interval=16"))
    with pytest.raises(ConfigError, match=r"train\.train_iters: 16 are too few: g-stack-2 comes no nearer .* -2\.5%"):
        settings_of(lambda settings: load("g-stack-2", settings), short, "g-stack-2")
