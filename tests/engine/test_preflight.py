from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.engine import preflight
from megatron_sgt.errors import ConfigError
from tests.helpers.single import small_config


def test_the_vocabulary_stays_what_it_is_without_a_tokenizer() -> None:
    config = small_config()
    assert preflight.with_vocabulary(config) == config


def test_places(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    preflight.check_surroundings(small_config(logging={"run_dir": str(tmp_path / "a" / "b")}))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ConfigError, match=r"logging.run_dir: cannot write to .*file/b: .*file is a file"):
        preflight.check_surroundings(small_config(logging={"run_dir": str(tmp_path / "file" / "b")}))
    spoilt = small_config(logging={"run_dir": str(tmp_path)}, checkpoint={"save": str(tmp_path / "file")})
    with pytest.raises(ConfigError, match=r"checkpoint.save: cannot write"):
        preflight.check_surroundings(spoilt)


def test_a_fresh_start(tmp_path: Path) -> None:
    start = preflight.find_start(small_config(logging={"run_dir": str(tmp_path)}))
    assert (start.folder, start.changed) == (None, ()) and "fresh start" in start.sentence


@pytest.mark.parametrize(
    ("section", "refused"),
    [
        ({}, None),
        ({"zero_optimization": {"reduce_bucket_size": 1000}}, None),
        ({"zero_optimization": {"bucket": 7}}, "bucket: Extra inputs are not permitted, got 7"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "got 'many'"),
        ({"flops_profiler": 3}, "refused by DeepSpeed"),
    ],
)
def test_deepspeed_section(section: dict[str, Any], refused: str | None) -> None:
    config = small_config(deepspeed=section)
    if refused is None:
        preflight.check_deepspeed(config, 1, "fp32")
        return
    with pytest.raises(ConfigError, match=refused):
        preflight.check_deepspeed(config, 1, "fp32")


def test_changed_settings_are_named() -> None:
    there = small_config(optim={"lr": 0.5}, logging={"run_dir": "a"}, train={"exit_interval": 3})
    here = small_config(optim={"lr": 0.25}, logging={"run_dir": "b"}, deepspeed={"amp": {"enabled": False}})
    assert list(preflight._changes(there, here)) == [
        "optim.lr 0.5 -> 0.25",
        "deepspeed.amp.enabled None -> False",
    ]
    assert list(preflight._changes(here, here)) == []
