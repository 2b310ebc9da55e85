"""What is compared: presets and claims that exist; where the runs go."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import study
from study_parts.contenders import GROWING, PAPER, Contender, Study

from megatron_sgt.config import load_config
from megatron_sgt.config.presets import BASELINES
from megatron_sgt.stages.presets import PRESETS
from tests.helpers.single import small_config


@pytest.mark.parametrize("one", [PAPER, GROWING], ids=["paper", "growing"])
def test_claims_are_about_presets_that_exist(one: Study) -> None:
    assert {name for claim in one.claims for name in (claim.better, claim.worse)} <= set(one.presets) <= set(PRESETS)
    assert one.baseline == "vanilla"


def test_the_paper_compares_baselines_as_they_are() -> None:
    found = PAPER.contenders(lambda preset, settings: small_config(), PAPER.presets)
    assert found == [Contender(name) for name in BASELINES]


@pytest.mark.parametrize("output", ["2024", "[a]", 'a "b": # c'])
def test_a_run_goes_where_it_is_told(output: str, tmp_path: Path) -> None:
    """The folder's name is no number, no list, no comment."""
    (tmp_path / "c.yaml").write_text(small_config(train={"eval_interval": 2}).to_yaml())
    args = argparse.Namespace(
        config=tmp_path / "c.yaml", overrides=["optim.lr=1"], output=Path(output), seeds=2, ranks=1
    )
    jobs = study.jobs_of([Contender("vanilla", ("train.train_iters=7",))], args)
    assert [job.run_dir for job in jobs] == [Path(output, f"vanilla-seed{seed}") for seed in (1, 2)]
    for job in jobs:
        config = load_config(tmp_path / "c.yaml", job.command[job.command.index("vanilla") + 1 :])
        assert Path(config.logging.run_dir) == job.run_dir
        assert (config.train.train_iters, config.optim.lr, config.train.seed) == (7, 1.0, job.seed)
