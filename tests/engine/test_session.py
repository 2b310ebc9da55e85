"""What of a run does not depend on its stage; bad stages are refused before any process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.engine.dry_run import dry_run
from megatron_sgt.engine.session import Session
from megatron_sgt.errors import ConfigError
from megatron_sgt.launch.rank_info import LOOPBACK, RankInfo
from tests.helpers.runs import tiny_config, write_tiny_data

MIDAS = {"until_steps": 4, "operator": "midas", "options": {"block_size": 5}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"stages": [{**MIDAS, "operator": "midass"}]}, r"^growth\.stages\[0\]: operator 'midass': .*did you mean 'midas'"),
    ({"stages": [{**MIDAS, "options": {"block_size": 2}}]}, r"num_layers 5 is no multiple of block_size 2"),
    ({"stages": [MIDAS, MIDAS]}, r"^growth\.stages\[1\]: ends at step 4, which is not after step 4"),
    ({"stages": [{**MIDAS, "until_steps": 18}]}, r"ends at step 18, but the run at train\.train_iters 18"),
]
"""Settings of growth, and what is said of them."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("growth", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_stages_are_refused_before_any_process_group(
    growth: dict[str, Any], message: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a process group was started")

    monkeypatch.setattr("megatron_sgt.engine.session.start_processes", never)
    config = tiny_config(tmp_path / "run", data, growth=growth)
    for start in (lambda: Session(config, RankInfo(0, 1, 0, 1, LOOPBACK, 29500, "single")), lambda: dry_run(config, 1)):
        with pytest.raises(ConfigError, match=message):
            start()
    assert not (tmp_path / "run").exists()
