"""The command line of pretrain_sgt.py. Mistakes on it: tests/integration/test_user_errors.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sgt.config import load_config
from megatron_sgt.engine.main import parse
from megatron_sgt.errors import ConfigError, ExitCode
from tests.helpers.commands import Finished, run_script
from tests.helpers.runs import reported, tiny_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def pretrain(folder: Path, data: str, *arguments: str, before: Callable[[], None] | None = None) -> Finished:
    config = folder / "run.yaml"
    config.write_text(tiny_config(folder / "run", data, train={"exit_interval": 2}).to_yaml())
    return run_script("pretrain_sgt.py", ["--config", str(config), *arguments], folder, before)


def test_options_and_overrides_may_be_mixed() -> None:
    args = parse(["optim.lr=1", "--config", "a.yaml", "train.seed=2", "--dry-run", "--world-size", "8"])
    assert args.config == Path("a.yaml")
    assert args.overrides == ["optim.lr=1", "train.seed=2"]
    assert (args.dry_run, args.print_config, args.world_size) == (True, False, 8)


@pytest.mark.parametrize("flag", ["--local_rank=3", "--local-rank=3"])
def test_the_argument_of_the_deepspeed_launcher_is_accepted(flag: str) -> None:
    assert parse([flag, "--config", "a.yaml", "optim.lr=1"]).overrides == ["optim.lr=1"]


@pytest.mark.parametrize("arguments", [[], ["--config"], ["--config", "a", "--world-size", "two"]])
def test_a_wrong_command_line_is_a_config_error(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"usage: pretrain_sgt\.py"):
        parse(arguments)


def test_help_names_the_launchers_and_exit_codes(tmp_path: Path) -> None:
    done = run_script("pretrain_sgt.py", ["--help"], tmp_path)
    assert done.code == 0
    for word in ("torchrun", "deepspeed --num_gpus", "srun", "mpirun", "exit codes", "75   stopped"):
        assert word in done.out


def test_print_config_is_the_resolved_configuration(data: str, tmp_path: Path) -> None:
    done = pretrain(tmp_path, data, "--print-config", "optim.lr=0.25")
    assert done.code == 0 and done.err == ""
    (tmp_path / "printed.yaml").write_text(done.out)
    assert load_config(tmp_path / "printed.yaml") == load_config(tmp_path / "run.yaml", ["optim.lr=0.25"])
    assert not (tmp_path / "run").exists()


def test_a_run_and_its_resumption(data: str, tmp_path: Path) -> None:
    first = pretrain(tmp_path, data)
    assert first.code == 0 and first.err == "", first.err
    assert "fresh start" in first.out and "DONE" in first.out
    (tmp_path / "run" / "save_now").touch()
    second = pretrain(tmp_path, data, "train.exit_interval=4")
    assert second.code == 0 and "resumed at step 2" in second.out, second.err
    assert "SAVE  step 3  as asked" in second.out and not (tmp_path / "run" / "save_now").exists()
    assert [record["step"] for record in reported(tmp_path / "run", "summary")] == [2, 4]
    asked = pretrain(tmp_path, data, "--save-now")
    assert asked.code == ExitCode.CHECKPOINT and "no run writes into" in asked.err


def test_a_run_that_is_out_of_time_saves_and_says_so(data: str, tmp_path: Path) -> None:
    endless = ("train.train_iters=1000000", "train.exit_interval=null")
    done = pretrain(tmp_path, data, *endless, "train.exit_duration_minutes=0.02")
    assert done.code == ExitCode.SAVED and done.err == ""
    [stop] = reported(tmp_path / "run", "stop")
    said = f"STOP  step {stop['step']}  train.exit_duration_minutes: saving, then leaving"
    assert said in done.out and "SAVED  step" in done.out and "start again to go on" in done.out
    again = pretrain(tmp_path, data, *endless, f"train.exit_interval={stop['step'] + 1}")
    assert again.code == ExitCode.DONE and f"resumed at step {stop['step']}" in again.out


def test_a_job_that_ends_before_the_first_step_leaves_nothing(data: str, tmp_path: Path) -> None:
    done = pretrain(tmp_path, data, before=near_the_end)
    assert done.code == ExitCode.SAVED and "the end of the Slurm job is near" in done.out
    assert not (tmp_path / "run/checkpoints").exists()


def near_the_end() -> None:
    os.environ["SLURM_JOB_END_TIME"] = str(int(time.time()) + 60)


def test_a_divergence_ends_with_1_and_one_line(data: str, tmp_path: Path) -> None:
    done = pretrain(tmp_path, data, "optim.lr=1e30", "optim.lr_warmup_iters=0", "train.exit_interval=null")
    assert done.code == 1
    assert done.err.startswith("error: 3 steps in a row") and "Traceback" not in done.err
    assert "skipped 1" in done.out and ("gn inf" in done.out or "gn NaN" in done.out)
    assert not list((tmp_path / "run/checkpoints").glob("global_step*"))


def spoil_training() -> None:
    """Make the first step fail as only a bug can."""
    from megatron_sgt.engine import loop

    def broken(*_: object) -> None:
        raise KeyError("a bug")

    loop.train_step = broken  # type: ignore[assignment]


def test_a_bug_shows_its_traceback_and_ends_with_1(data: str, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(tiny_config(tmp_path / "run", data).to_yaml())
    done = run_script("pretrain_sgt.py", ["--config", str(config)], tmp_path, before=spoil_training)
    assert done.code == 1
    assert "Traceback" in done.err and "KeyError: 'a bug'" in done.err
