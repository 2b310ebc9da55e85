"""What a new run takes of another's checkpoint, and what is refused; tests/integration/test_new_run.py has runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.contents import read_contents
from megatron_sgt.checkpoint.describe import describe
from megatron_sgt.checkpoint.find import find_checkpoint, verify_quickly
from megatron_sgt.checkpoint.new_run import check_weights
from megatron_sgt.config import Config
from megatron_sgt.config.growth import RampConfig
from megatron_sgt.errors import CheckpointError, ConfigError
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.structure import resumed_schedule
from megatron_sgt.preflight import find_start
from tests.helpers.checkpoints import GROWN_STEP, grown_config, write_grown_checkpoint
from tests.helpers.deepspeed_files import write_manifest


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a run that has selected layers 3 and 1, the latter in the middle of its window."""
    return write_grown_checkpoint(tmp_path_factory.mktemp("old"))


def new_run(root: Path, old: Path, growth: str | None = None, **sections: dict[str, Any]) -> Config:
    values = grown_config().model_dump()
    checkpoint = {"load": str(old), "start": "weights", "growth": growth, "save": str(root / "own")}
    sections["checkpoint"] = {**checkpoint, **sections.get("checkpoint", {})}
    for name, section in sections.items():
        values[name] |= section
    return Config.model_validate({**values, "growth": {**values["growth"], "stages": ()}})


def test_loops_are_kept_as_inference_has_them(old: Path, tmp_path: Path) -> None:
    """Gates that were fading are 0 from the first step on; nothing is decided any more."""
    config = new_run(tmp_path, old, growth=None)
    start = find_start(config)
    assert (start.folder, start.explicit, start.weights, start.changed) == (old, True, "model", ())
    assert start.saved["trainer"] == dict.fromkeys(
        ("step", "consumed_samples", "skipped_steps", "consecutive_skipped"), 0
    )
    schedule = resumed_schedule(config, start.saved["hooks"]["growth"])
    before = resumed_schedule(grown_config(), layout.read_json(old / layout.STATE_FILE)["hooks"]["growth"]).plan
    assert before[1].other_gate > 0 and schedule.plan == before.inference() and schedule.phase == "fixed"
    assert schedule.after_step(1) == [] and schedule.plan == before.inference() and schedule.selected_at() == {}
    assert "loops kept" in start.sentence(config) and f"step {GROWN_STEP:,}" in start.sentence(config)


def test_growth_begins_anew_when_asked(old: Path, tmp_path: Path) -> None:
    config = new_run(tmp_path, old, "restart")
    start = find_start(config)
    assert start.saved["hooks"] == {} and "growth anew" in start.sentence(config)
    assert resumed_schedule(config, start.saved["hooks"].get("growth")).plan == LoopPlan.empty(4)


@pytest.mark.parametrize(
    ("growth", "told"),
    [
        ({"method": "vanilla"}, r"growth\.method: is vanilla, which does not make the loops"),
        ({"max_loop_depth": 1}, r"growth\.max_loop_depth: is 1, but the loops .* need 2"),
        ({"max_selected_layers": 1}, r"growth\.max_selected_layers: is 1, but .* need 2"),
        ({"num_keep_heads": 1}, r"growth\.num_keep_heads: is 1, but .* need 2"),
    ],
)
def test_a_schedule_that_cannot_have_made_the_loops_says_so(
    growth: dict[str, Any], told: str, old: Path, tmp_path: Path
) -> None:
    kept, anew = (
        new_run(tmp_path, old, how).model_copy(update={"growth": _growth(growth)}) for how in ("keep", "restart")
    )
    with pytest.raises(CheckpointError, match=rf"cannot keep: {told}.*restart"):
        find_start(kept)
    find_start(anew)


def _growth(values: dict[str, Any]) -> Any:
    return grown_config().growth.model_copy(update=values)


def test_another_shape_is_refused_and_another_meaning_is_told(old: Path, tmp_path: Path) -> None:
    other = {"qk_layernorm": True}
    with pytest.raises(
        CheckpointError, match=r"another model: model\.qk_layernorm is False there and True here"
    ) as caught:
        find_start(new_run(tmp_path, old, model=other))
    assert caught.value.exit_code == 4
    there = grown_config().model
    rows = there.padded_vocab_size()
    with pytest.raises(CheckpointError, match=rf"has {rows} rows there, .* has {2 * rows} here"):
        find_start(new_run(tmp_path, old, model={"vocab_size": 2 * rows}))
    meant = {"seq_length": 64, "rotary_base": 5e5, "rotary_scaling": {"type": "linear", "factor": 2.0}}
    changed = find_start(new_run(tmp_path, old, model=meant, train={"seed": 5})).changed
    assert {line.split(" ")[0].removesuffix(".type").removesuffix(".factor") for line in changed} == {
        "model.seq_length", "model.rotary_base", "model.rotary_scaling",
    }  # fmt: skip
    config, whole = new_run(tmp_path, old), verify_quickly(old)
    whole.about["tokenizer"] = "abc"
    assert check_weights(old, whole, config, "abc") == ()
    [told] = check_weights(old, whole, config, "def")
    assert told == "the tokenizer (fingerprint abc -> def): the same text becomes other tokens"


def test_weights_that_are_being_faded_in_and_an_average_that_is_not_there(old: Path, tmp_path: Path) -> None:
    whole, ramp = verify_quickly(old), RampConfig(first=2, steps=GROWN_STEP, layers=(1,))
    fading = whole.config.model_copy(update={"growth": whole.config.growth.model_copy(update={"ramp": ramp})})
    config = new_run(tmp_path, old)
    with pytest.raises(CheckpointError, match=rf"until step {ramp.end}: the weights alone are another model"):
        check_weights(old, type(whole)(whole.about, whole.state, fading), config, None)
    with pytest.raises(ConfigError, match=r"growth\.ramp: fades in"):
        check_weights(old, whole, fading.model_copy(update={"checkpoint": config.checkpoint}), None)
    with pytest.raises(CheckpointError, match=r"no average of the weights.* checkpoint\.weights to model"):
        find_start(new_run(tmp_path, old, checkpoint={"weights": "ema"}))


def test_a_new_run_has_folders_of_its_own(old: Path, tmp_path: Path) -> None:
    for load in (old, old.parent):
        with pytest.raises(CheckpointError, match="needs folders of its own"):
            find_checkpoint(new_run(tmp_path, load, checkpoint={"save": str(old.parent)}))
    foreign = write_grown_checkpoint(tmp_path / "own")
    with pytest.raises(CheckpointError, match=rf"a run that did not begin so \({foreign.name}\)"):
        find_checkpoint(new_run(tmp_path, old))
    with pytest.raises(CheckpointError, match="resume is never, but"):
        find_checkpoint(new_run(tmp_path, old, checkpoint={"resume": "never"}))


def test_its_own_checkpoints_count_and_tell_where_it_began(old: Path, tmp_path: Path) -> None:
    """Also when the other run's checkpoint is gone; and a third run counts the tokens of both."""
    config = new_run(tmp_path, old)
    origin = find_start(config).saved[layout.ORIGIN_STATE]
    tokens = layout.read_json(old / layout.STATE_FILE)["trainer"]["consumed_samples"] * config.model.seq_length
    assert (origin["step"], origin["tokens"], origin["growth"]) == (GROWN_STEP, tokens, "keep")
    own = write_grown_checkpoint(tmp_path / "own")
    state = layout.read_json(own / layout.STATE_FILE)
    layout.write_json(own / layout.STATE_FILE, {**state, layout.ORIGIN_STATE: origin})
    write_manifest(own)
    found = find_checkpoint(new_run(tmp_path, tmp_path / "gone"))
    assert found.folder == own and not found.explicit
    text = describe(read_contents(own, lambda _: []))
    assert f"began     with the weights of {old} (step {GROWN_STEP}, {tokens:,} tokens), loops kept" in text
    third = find_start(new_run(tmp_path / "third", own, "restart")).saved[layout.ORIGIN_STATE]
    assert third["tokens"] == 2 * tokens
    layout.write_json(own / layout.STATE_FILE, {**state, layout.ORIGIN_STATE: {**origin, "tokens": -1}})
    write_manifest(own)
    with pytest.raises(CheckpointError, match=r"origin\.tokens is -1, not a whole number"):
        find_start(new_run(tmp_path / "fourth", own))
