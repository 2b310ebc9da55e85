"""What a run starts from, and the checks that come before any weight is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint import layout, manifest
from megatron_sgt.checkpoint.find import Found, check_checkpoint, find_checkpoint
from megatron_sgt.checkpoint.load import verify_together
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.preflight import find_start
from tests.helpers.checkpoints import ZERO_1
from tests.helpers.checkpoints import write_plain_checkpoint as make
from tests.helpers.damage import DAMAGES, damaged, harm
from tests.helpers.deepspeed_files import counters
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import small_config


def config_in(root: Path, **sections: dict[str, Any]) -> Config:
    """A run that saves to ``root``/own."""
    checkpoint = {"save": str(root / "own"), **sections.pop("checkpoint", {})}
    return small_config(checkpoint=checkpoint, **sections)


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert find_checkpoint(config_in(tmp_path)) == Found(None)


def test_resume_auto_takes_the_runs_own_newest(tmp_path: Path) -> None:
    make(tmp_path / "own/global_step2")
    newest = make(tmp_path / "own/global_step10")
    elsewhere = make(tmp_path / "other/global_step50")
    for checkpoint in ({}, {"load": str(elsewhere)}):
        found = find_checkpoint(config_in(tmp_path, checkpoint=checkpoint))
        assert found == Found(newest)


def test_load_is_taken_where_the_run_has_none(tmp_path: Path) -> None:
    older, newer = make(tmp_path / "other/global_step3"), make(tmp_path / "other/global_step5")
    for given, expected in ((tmp_path / "other", newer), (older, older)):
        found = find_checkpoint(config_in(tmp_path, checkpoint={"load": str(given)}))
        assert found == Found(expected, explicit=True)


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
    assert find_checkpoint(config_in(tmp_path, checkpoint=never)).folder is None
    make(tmp_path / "own/global_step2")
    with pytest.raises(CheckpointError, match=r"resume is never, but .* of another run: global_step2\. Choose"):
        find_checkpoint(config_in(tmp_path, checkpoint=never))


def test_a_whole_checkpoint_passes_and_gives_its_state(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    assert check_checkpoint(folder, small_config())["trainer"] == counters(7)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose ``own`` holds two checkpoints of a run."""
    root = tmp_path_factory.mktemp("pair")
    for step in (2, 4):
        make(root / f"own/global_step{step}")
    layout.point_to(root / "own", "global_step4")
    return root


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_of_the_newest_is_named_and_passed_over(damage: str, pair: Path) -> None:
    """And refused where the user named the checkpoint."""
    newest, older = pair / "own/global_step4", pair / "own/global_step2"
    ours, groups = config_in(pair), fake_groups()
    theirs = config_in(pair, checkpoint={"save": str(pair / "new"), "load": str(newest)})
    names = [*layout.file_sizes(newest), layout.MANIFEST_FILE]
    assert len(names) == 6
    for name in names:
        with damaged(newest / name, damage):
            found = find_checkpoint(ours)
            if found.folder == newest:  # sizes do not show it: the ranks read every byte together
                problem = verify_together(newest, ours, groups)
                assert problem is not None and name in problem
                found = find_checkpoint(ours, {newest: problem})
            assert found.folder == older, name
            # Without its manifest a checkpoint is none, and what is told is that latest names it in vain.
            no_manifest = (name, damage) == (layout.MANIFEST_FILE, "delete")
            assert ("global_step4" if no_manifest else name) in " ".join(found.skipped)
            with pytest.raises(CheckpointError, match="no whole checkpoint" if no_manifest else name) as caught:
                folder = find_checkpoint(theirs).folder
                assert folder is not None
                check_checkpoint(folder, theirs)
                raise CheckpointError(verify_together(folder, theirs, groups) or "nothing was found")
            assert caught.value.exit_code == 4


@pytest.mark.parametrize("text", [None, "", "global_step9", "global_step4x"])
def test_a_damaged_tracker_is_no_new_start(text: str | None, pair: Path) -> None:
    with damaged(pair / "own/latest", "delete"):
        if text is not None:
            (pair / "own/latest").write_text(text)
        found = find_checkpoint(config_in(pair))
        assert found.folder == pair / "own/global_step4"
        assert len(found.skipped) == (text is not None)


def test_never_step_0_when_all_are_damaged(tmp_path: Path) -> None:
    for step in (2, 4):
        harm(make(tmp_path / f"own/global_step{step}") / "mp_rank_00_model_states.pt", "cut")
    with pytest.raises(CheckpointError, match=r"global_step4 is damaged.*global_step2 is damaged.*from scratch"):
        find_checkpoint(config_in(tmp_path))


def test_a_file_that_the_manifest_does_not_name_is_missed(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    about = manifest.read_manifest(folder)
    del about["files"]["zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    manifest.write_manifest(folder, {"layout": about["layout"]}, about["files"])
    with pytest.raises(CheckpointError, match=r"optim_states\.pt is not listed in manifest\.json"):
        check_checkpoint(folder, small_config())


def test_stages_of_another_model_are_damage(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    state = layout.read_json(folder / layout.STATE_FILE)
    for size, counts, said in (
        (2, [2, 3], r"sgt_state\.json is of another model: the stages of its pipeline hold 5 layers, its model has 4"),
        (9, [1] * 9, r"manifest\.json lists 5 files for the ranks of its layout"),
        (2, [2, 2], r"mp_rank_01_model_states\.pt is not listed"),
    ):
        where = {**state["layout"], layout.PIPELINE_SIZE: size, layout.PIPELINE_COUNTS: counts}
        layout.write_json(folder / layout.STATE_FILE, {**state, "layout": where})
        listed = {} if "another model" in said else {"layout": where}
        manifest.write_manifest(folder, listed)
        with pytest.raises(CheckpointError, match=said):
            check_checkpoint(folder, small_config())


def test_sizes_alone_when_the_user_says_so(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    torch.save({"module": {}, "large": torch.zeros(10**6)}, folder / "mp_rank_00_model_states.pt")
    manifest.write_manifest(folder, {})
    harm(folder / "mp_rank_00_model_states.pt", "flip")
    groups = fake_groups()
    assert verify_together(folder, small_config(checkpoint={"verify": "sizes"}), groups) is None
    assert "has changed" in (verify_together(folder, small_config(), groups) or "")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7", tokenizer="abc")
    for same in ("abc", None):
        check_checkpoint(folder, small_config(), same)
    with pytest.raises(CheckpointError, match="another tokenizer: its fingerprint is abc there and def here"):
        check_checkpoint(folder, small_config(), "def")


def test_another_model_is_refused_field_by_field(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    other = small_config(model={"num_layers": 3, "ffn_hidden_size": 128}, growth={"top_k_layers": 2})
    with pytest.raises(CheckpointError, match="belongs to another model") as caught:
        check_checkpoint(folder, other)
    assert "model.num_layers is 4 there and 3 here" in str(caught.value)
    assert "model.ffn_hidden_size is 96 there and 128 here" in str(caught.value)
    assert "hidden_size is 64" not in str(caught.value).replace("ffn_hidden_size", "")


LINEAR = {"type": "linear", "factor": 2.0}


def test_another_scaling_of_positions_is_another_model(tmp_path: Path) -> None:
    """As another rotary_base is; the context that an export names is not."""
    folder = make(tmp_path / "global_step7", model={"rotary_scaling": LINEAR})
    check_checkpoint(folder, small_config(model={"rotary_scaling": {**LINEAR, "context_length": 64}}))
    said = r"model\.rotary_scaling is \{'type': 'linear', 'factor': 2\.0\} there and None here"
    with pytest.raises(CheckpointError, match=said):
        check_checkpoint(folder, small_config())


def test_what_shapes_no_weight_may_change(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    free = {"seq_length": 64, "attention_dropout": 0.1, "hidden_dropout": 0.1, "init_method_std": 0.01}
    check_checkpoint(folder, small_config(model=free, optim={"lr": 5e-4}, train={"seed": 9}))


def test_an_average_whose_files_are_not_listed_is_damage(tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step3")
    state = layout.read_json(folder / layout.STATE_FILE)
    layout.write_json(folder / layout.STATE_FILE, {**state, layout.AVERAGE_STATE: {"decay": 0.9}})
    manifest.write_manifest(folder, {"layout": state["layout"]})
    with pytest.raises(CheckpointError, match=r"ema_0000_mp_rank_00\.pt is not listed in manifest\.json"):
        check_checkpoint(folder, small_config(deepspeed=ZERO_1))


def test_a_ramp_counts_until_it_has_ended(tmp_path: Path) -> None:
    ramp = {"first": 3, "steps": 3, "layers": [3]}
    fading, faded = (make(tmp_path / f"global_step{step}", growth={"ramp": ramp}) for step in (5, 6))
    check_checkpoint(fading, small_config(growth={"ramp": ramp}))
    for other in (None, {**ramp, "steps": 4}):
        with pytest.raises(CheckpointError, match=r"at step 5, and growth\.ramp is .*'steps': 3.* there and .* here"):
            check_checkpoint(fading, small_config(growth={"ramp": other}))
    check_checkpoint(faded, small_config())
    with pytest.raises(CheckpointError, match=r"at step 6, and growth\.ramp .*'steps': 3.* there and .*'steps': 4"):
        check_checkpoint(faded, small_config(growth={"ramp": {**ramp, "steps": 4}}))


def test_what_a_ramp_fades_in_must_be_there(tmp_path: Path) -> None:
    early = {"ramp": {"first": 6, "steps": 3, "layers": [3]}}
    with pytest.raises(ConfigError, match=r"added after step 6, but the run starts from step 0; .* remove it"):
        find_start(config_in(tmp_path, growth=early))
    with pytest.raises(ConfigError, match=r"added after step 6, but the run starts from step 5"):
        check_checkpoint(make(tmp_path / "global_step5", growth=early), small_config(growth=early))
