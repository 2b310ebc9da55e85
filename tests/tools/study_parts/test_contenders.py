"""What is compared: contenders and claims that fit each other and the presets."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import study
from study_parts.contenders import PAPER, Contender
from study_parts.growing import GROWING

from megatron_sgt.config import load_config
from megatron_sgt.config.presets import PRESETS
from tests.helpers.single import small_config


@pytest.mark.parametrize("one", [PAPER, GROWING], ids=["paper", "growing"])
def test_claims_are_about_contenders(one: object) -> None:
    assert isinstance(one, study.Study)
    assert {name for claim in one.claims for name in (claim.better, claim.worse)} <= {*one.names, one.baseline}
    assert one.baseline in one.names


def test_the_paper_compares_all_presets() -> None:
    found = PAPER.contenders(lambda preset, settings: small_config(), PAPER.names)
    assert found == [Contender(name, name) for name in PRESETS]


@pytest.mark.parametrize("output", ["2024", "[a]", 'a "b": # c'])
def test_a_run_goes_where_it_is_told(output: str, tmp_path: Path) -> None:
    """The folder's name is no number, no list, no comment."""
    (tmp_path / "c.yaml").write_text(small_config(train={"eval_interval": 2}).to_yaml())
    args = argparse.Namespace(config=tmp_path / "c.yaml", overrides=[], output=Path(output), seeds=2, ranks=1)
    jobs = study.jobs_of([Contender("vanilla", "vanilla")], args)
    assert [job.run_dir for job in jobs] == [Path(output, f"vanilla-seed{seed}") for seed in (1, 2)]
    for job in jobs:
        start = job.command.index("--preset")
        config = load_config(tmp_path / "c.yaml", job.command[start + 2 :], job.command[start + 1])
        assert Path(config.logging.run_dir) == job.run_dir
