"""What a run starts from, and the checks that come before any weight is touched."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.load import check_checkpoint, find_checkpoint, load_checkpoint
from megatron_sgt.checkpoint.save import layout_of
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.parallel.rng import rng_state
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config


def config_in(root: Path, **sections: dict[str, Any]) -> Config:
    """A run that saves to ``root``/own."""
    checkpoint = {"save": str(root / "own"), **sections.pop("checkpoint", {})}
    return small_config(checkpoint=checkpoint, **sections)


def make(folder: Path, **sections: dict[str, Any]) -> Path:
    """A whole checkpoint as far as its checks go: state, configuration, streams, one shard, manifest."""
    folder.mkdir(parents=True)
    config = small_config(**sections)
    state = {"trainer": {"step": layout.step_of(folder.name)}, "layout": layout_of(config, fake_groups())}
    layout.write_json(folder / layout.STATE_FILE, state)
    (folder / layout.CONFIG_FILE).write_text(config.to_yaml())
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"m" * 4096)
    torch.save(rng_state(torch.device("cpu")), folder / layout.rng_file(0))
    layout.write_json(folder / layout.MANIFEST_FILE, {"files": layout.file_sizes(folder)})
    return folder


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    folder, sentence = find_checkpoint(config_in(tmp_path))
    assert folder is None
    assert sentence == f"fresh start: no checkpoint in {tmp_path}/own"


def test_resume_auto_takes_the_runs_own_newest(tmp_path: Path) -> None:
    make(tmp_path / "own/global_step2")
    newest = make(tmp_path / "own/global_step10")
    elsewhere = make(tmp_path / "other/global_step50")
    for checkpoint in ({}, {"load": str(elsewhere)}):
        folder, sentence = find_checkpoint(config_in(tmp_path, checkpoint=checkpoint))
        assert folder == newest and sentence == f"resuming from {newest}"


def test_load_is_taken_where_the_run_has_none(tmp_path: Path) -> None:
    older, newer = make(tmp_path / "other/global_step3"), make(tmp_path / "other/global_step5")
    for given, expected in ((tmp_path / "other", newer), (older, older)):
        folder, sentence = find_checkpoint(config_in(tmp_path, checkpoint={"load": str(given)}))
        assert folder == expected and sentence == f"starting from {expected} (checkpoint.load)"


@pytest.mark.parametrize("place", ["absent", "empty", "unfinished"])
def test_load_that_finds_nothing_is_an_error(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "unfinished/global_step3")
    (tmp_path / "unfinished/global_step3" / layout.MANIFEST_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"no .*checkpoint at .*{place}") as caught:
        find_checkpoint(config_in(tmp_path, checkpoint={"load": str(tmp_path / place)}))
    assert caught.value.exit_code == 4


def test_resume_never_does_not_mix_two_runs(tmp_path: Path) -> None:
    never = {"resume": "never"}
    assert find_checkpoint(config_in(tmp_path, checkpoint=never))[0] is None
    make(tmp_path / "own/global_step2")
    with pytest.raises(
        CheckpointError, match=r"resume is never, but .* of another run: global_step2\. Choose"
    ):
        find_checkpoint(config_in(tmp_path, checkpoint=never))


def test_a_whole_checkpoint_passes_and_gives_its_state(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    assert check_checkpoint(folder, small_config())["trainer"] == {"step": 7}


@pytest.mark.parametrize(
    "name", ["mp_rank_00_model_states.pt", layout.rng_file(0), layout.STATE_FILE, layout.CONFIG_FILE]
)
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_damage_is_found_by_name(name: str, damage: str, tmp_path: Path) -> None:
    file = make(tmp_path / "global_step7") / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    expected = "is missing" if damage == "missing" else "bytes instead of"
    with pytest.raises(
        CheckpointError, match=rf"global_step7 is damaged: {name} .*{expected}|{name} is missing"
    ):
        check_checkpoint(tmp_path / "global_step7", small_config())


def test_a_manifest_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    (folder / layout.MANIFEST_FILE).write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be read"):
        check_checkpoint(folder, small_config())


def test_another_model_is_refused_field_by_field(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    other = small_config(model={"num_layers": 3, "ffn_hidden_size": 128}, growth={"top_k_layers": 2})
    with pytest.raises(CheckpointError, match="belongs to another model") as caught:
        check_checkpoint(folder, other)
    assert "model.num_layers is 4 there and 3 here" in str(caught.value)
    assert "model.ffn_hidden_size is 96 there and 128 here" in str(caught.value)
    assert "hidden_size is 64" not in str(caught.value).replace("ffn_hidden_size", "")


def test_what_shapes_no_weight_may_change(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    free = {"seq_length": 64, "attention_dropout": 0.1, "hidden_dropout": 0.1, "init_method_std": 0.01}
    check_checkpoint(folder, small_config(model=free, optim={"lr": 5e-4}, train={"seed": 9}))


class Engine:
    """DeepSpeed's engine, as far as loading goes: overwrites its settings, as the real one does."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3, "weight_decay": 0.1, "params": []}])

    def load_checkpoint(self, root: str, tag: str) -> tuple[str | None, None]:
        assert tag == "global_step7"
        self.optimizer.param_groups[0].update(lr=0.5, weight_decay=0.5)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome, None


def load(folder: Path, outcome: Any) -> Engine:
    config, engine = small_config(), Engine(outcome)
    stand_in: Any = engine
    assert load_checkpoint(folder, check_checkpoint(folder, config), config, stand_in, fake_groups()) is None
    return engine


def test_streams_continue_and_settings_stay_this_runs(tmp_path: Path) -> None:
    torch.manual_seed(3)
    folder = make(tmp_path / "global_step7")
    expected = torch.rand(4)
    torch.manual_seed(99)
    engine = load(folder, "found")
    assert torch.equal(torch.rand(4), expected)
    assert engine.optimizer.param_groups == [{"lr": 1e-3, "weight_decay": 0.1, "params": []}]


@pytest.mark.parametrize(
    "outcome", [None, RuntimeError("size mismatch"), OSError("gone"), AssertionError("ranks")]
)
def test_what_deepspeed_cannot_load_is_an_error(outcome: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    expected = "found nothing to load" if outcome is None else f"cannot be loaded: {outcome}"
    with pytest.raises(CheckpointError, match=expected):
        load(folder, outcome)


def test_streams_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    (folder / layout.rng_file(0)).write_bytes(b"not a torch file")
    layout.write_json(folder / layout.MANIFEST_FILE, {"files": layout.file_sizes(folder)})
    with pytest.raises(CheckpointError, match=r"rng_rank_00000\.pt cannot be read"):
        load(folder, "found")
