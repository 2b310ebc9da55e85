"""Numbers that nobody means: one line before anything starts; and what passes the dry run starts.

The table is made of the settings themselves, so that a new one cannot be left out.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.cli import number, positive, seed
from megatron_sgt.config import parse_config
from megatron_sgt.config.base import MOST_SEED
from megatron_sgt.engine.dry_run import dry_run
from megatron_sgt.errors import SGTError
from tests.edges.test_paths import leaves, values_with
from tests.helpers.commands import run_script
from tests.helpers.edges import refused
from tests.helpers.runs import tiny_config, write_tiny_data

EXTREMES = (-1, 0, -0.0, 1, 1e3, 1e-320, 1e30, 1e308, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 10**400,
            -(10**400), math.inf, -math.inf, math.nan)  # fmt: skip
NUMBERS = {name: "int" if "int" in str(field.annotation) else "float" for name, field in leaves()
           if any(kind in str(field.annotation) for kind in ("int", "float"))}  # fmt: skip
INTEGERS = [name for name, kind in NUMBERS.items() if kind == "int"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def with_value(name: str, value: Any, data: str, run_dir: Path) -> dict[str, Any]:
    values = values_with(name, value)
    values["logging"]["run_dir"] = str(run_dir)
    values["data"] |= {"data_path": [data], "data_cache_path": str(run_dir)}
    return values


def test_the_table_has_all_kinds() -> None:
    assert {"train.seed", "growth.exclude_layers", "train.exit_interval", "optim.lr"} <= NUMBERS.keys()
    assert len(NUMBERS) > 50


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_a_setting(name: str, data: str, tmp_path: Path) -> None:
    """Every extreme value is refused in one line that names the setting, or the dry run takes it."""
    for value in EXTREMES:
        try:
            config = parse_config(with_value(name, value, data, tmp_path))
            dry_run(config, config.parallel.tensor_model_parallel_size)
        except SGTError as error:
            assert len(str(error).splitlines()) < 5, error
            assert all(len(line) < 400 for line in str(error).splitlines()), error
            continue
        assert math.isfinite(value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", INTEGERS)
def test_every_integer_has_a_bound(name: str, data: str, tmp_path: Path) -> None:
    for value in (2**63, 2**64 - 1, 10**400):
        given = [1, value] if "tuple" in str(dict(leaves())[name].annotation) else value
        with pytest.raises(SGTError, match=r"must be (<=|0, 1, 2 or 3|an integer)"):
            parse_config(with_value(name, given, data, tmp_path))


def test_the_largest_values_start(data: str, tmp_path: Path) -> None:
    largest = {
        "train": {
            "seed": MOST_SEED, "exit_interval": 1, "train_iters": 2**31 - 1, "eval_interval": 2**31 - 1,
            "hang_timeout_seconds": 1e8, "slow_phase_timeout_seconds": 1e8, "exit_duration_minutes": 1e6,
            "exit_grace_seconds": 1e8, "spike_window_steps": 2**31 - 1, "max_consecutive_skipped_steps": 2**31 - 1,
        },
        "growth": {"seed": MOST_SEED, "first_selection_step": 2**31 - 1},
        "parallel": {"distributed_timeout_minutes": 1e6},
        "checkpoint": {"save_interval": 2**31 - 1, "keep_last": 2**31 - 1},
        "optim": {"adam_eps": 1e-320, "lr_warmup_iters": 2**31 - 1},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(tiny_config(tmp_path / "run", data, **largest).to_yaml())
    done = run_script("pretrain_sgt.py", ["--config", "run.yaml"], tmp_path)
    assert done.code == 0 and done.err == "", done.err
    assert "stopped early" in done.out


@pytest.mark.parametrize("value", ["18446744073709551615", "-1", "1e3", ".inf", "1" + "0" * 5000])
def test_a_seed_on_the_command_line(value: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(tiny_config(tmp_path / "run", data).to_yaml())
    refused(run_script("pretrain_sgt.py", ["--config", "run.yaml", f"train.seed={value}"], tmp_path), 2, "seed")


def test_arguments() -> None:
    assert (positive("3"), seed("0"), seed(str(MOST_SEED)), number("1e-3")) == (3, 0, MOST_SEED, 1e-3)
    for kind, text in ((positive, "9" * 5000), (positive, str(2**63)), (seed, "-1"), (seed, str(2**64 - 1)),
                       (number, "nan"), (number, "1e400"), (number, "x")):  # fmt: skip
        with pytest.raises(Exception, match="must be") as caught:
            kind(text)
        assert len(str(caught.value)) < 200
