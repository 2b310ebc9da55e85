"""The search finds what trying everything finds, and tells settings that the rules accept and that fit."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sgt.config import Config, load_config
from megatron_sgt.errors import ConfigError
from megatron_sgt.planning.advice import RECOMPUTE
from megatron_sgt.planning.hardware import USABLE, find_gpu
from megatron_sgt.planning.rank_memory import peak_memory
from megatron_sgt.planning.render_search import overrides
from megatron_sgt.planning.search import FITS, Candidate, Layout, Run, _candidate, _least_seconds, search
from megatron_sgt.planning.stages import plan_stages
from megatron_sgt.planning.step_time import Machine

EXAMPLE = Path(__file__).parents[2] / "examples" / "configs" / "sgt_1.2b.yaml"
FEW = [
    "model.vocab_size=32000",
    "model.num_layers=6",
    "train.global_batch_size=16",
    "train.micro_batch_size=2",
]


def example(*settings: str) -> Config:
    return load_config(EXAMPLE, [*FEW, *settings])


def run(memory: float, ranks: int = 4, node: int = 2, *settings: str) -> Run:
    """On GPUs with room for ``memory`` bytes."""
    gpu = replace(find_gpu("h100"), memory=memory / USABLE / FITS)
    return Run(plan_stages(example(*settings)), ranks, Machine(gpu, node), "bf16")


def everything(run: Run) -> list[Candidate]:
    found = []
    sizes = itertools.product((1, 2), (1, 2, 4), (1, 2, 4), (1, 2, 4, 8, 16), (True, False), range(4), RECOMPUTE)
    for size in sizes:
        layout = Layout(*size)
        if (layout.virtual > 1 and layout.pipeline == 1) or layout.sequence_parallel is (layout.tensor == 1):
            continue
        try:
            found.append(_candidate(run, layout))
        except ConfigError:
            continue
    return found


@pytest.mark.parametrize("memory", [5e9, 12e9])
def test_it_finds_what_trying_everything_finds(memory: float) -> None:
    here = run(memory)
    every = everything(here)
    fitting = sorted((one for one in every if one.fits), key=lambda one: one.time.total)
    best: dict[tuple[int, int], float] = {}
    for one in fitting:
        best.setdefault((one.layout.tensor, one.layout.pipeline), one.time.total)
    found = search(here, told=4)
    told = {(one.layout.tensor, one.layout.pipeline): one.time.total for one in found.best}
    assert told == pytest.approx(dict(itertools.islice(best.items(), 4)), rel=1e-3)
    assert len(fitting) < len(every) and found.excluded is not None
    assert not found.excluded.fits and found.excluded.time.total <= found.best[0].time.total
    assert all(_least_seconds(one) <= one.time.total for one in every)


def test_what_it_tells_can_be_pasted() -> None:
    """The settings make the configuration whose memory and time were told."""
    here = run(8e9)
    for one in search(here, told=4).best:
        pasted = example(*overrides(one), "train.precision=bf16")
        assert pasted.model_dump() == {**one.config.model_dump()}
        plans = [stretch.plan for stretch in here.stages[0].stretches]
        assert peak_memory(pasted, plans, 4, "bf16") == one.fullest.total <= 0.95 * here.limit


def test_the_time_of_a_run_has_the_batches_of_its_phases() -> None:
    plain, phased = run(12e9), run(12e9, 4, 2, "phases=[{until_steps: 100, global_batch_size: 64}, {}]")
    layout = Layout(1, 1, 1, 2, False, 2, "none")
    (seconds, tokens), (longer, more) = (_candidate(one, layout).whole_run() for one in (plain, phased))
    assert (more, longer) == (4 * tokens, pytest.approx(4 * seconds, rel=1e-2)), "the second phase goes on with 64"


def test_growth_decides_too() -> None:
    """A GPU that holds the best layout before growth, and not in a window."""
    (best,) = search(run(80e9, 1, 1), told=1).best
    before, after = best.peak_before_growth(), best.fullest.total
    assert before < after
    found = search(run((before + after) / 2, 1, 1), told=1)
    assert found.best[0].layout != best.layout


def test_where_nothing_fits_the_layout_that_needs_least_is_told() -> None:
    found = search(run(1e9))
    assert not found.best and found.excluded is not None
    least = min(one.fullest.total for one in everything(run(1e9)))
    assert found.excluded.fullest.total == least


def test_where_the_batch_goes_into_no_layout_the_rules_last_words_are_told() -> None:
    with pytest.raises(ConfigError, match=r"no layout of 7 GPUs is accepted; .* batch sizes do not multiply"):
        search(run(80e9, 7, 1))


def test_tensor_parallel_groups_lie_inside_a_node() -> None:
    assert {one.layout.tensor for one in search(run(80e9, 8, 2), told=99).best} == {1, 2}
