"""Where a checkpoint lies among the stages of a run, and what is refused: stages that have begun cannot change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint.place import check_past_phases, place_of
from megatron_sgt.config import Config, load_config
from megatron_sgt.errors import CheckpointError
from megatron_sgt.stages.presets import preset_named
from megatron_sgt.stages.stages import stages_of
from tests.helpers.single import small_config

DEPTH = {"until_steps": 4, "operator": "midas", "options": {"block_size": 1}}
WIDTH = {"until_steps": 8, "operator": "msg", "options": {"ffn_hidden_size": 128}}


def run(*stages: dict[str, Any], **sections: Any) -> Config:
    return small_config(growth={"method": "vanilla", "stages": list(stages)}, train={"train_iters": 12}, **sections)


RUN = run(DEPTH, WIDTH)


def place(config: Config, step: int, stage: int, of: Config = RUN) -> tuple[int, int, bool]:
    """Of a checkpoint of ``of``, saved in its stage ``stage``, in a run of ``config``: its stage, the next step's."""
    stages = stages_of(of)
    saved = {"trainer": {"step": step}, "stages": [one.record() for one in stages[1 : stage + 1]]}
    found = place_of(config, Path("global_step"), saved, stages[stage].config.model)
    assert found.there.config.growth.stages == () and found.here.index == stages_of(config).index(found.here)
    return found.there.index, found.here.index, found.grows


@pytest.mark.parametrize(
    ("step", "stage", "here"),
    [(0, 0, 0), (3, 0, 0), (4, 0, 1), (4, 1, 1), (5, 1, 1), (8, 1, 2), (9, 2, 2), (12, 2, 2)],
)
def test_the_last_checkpoint_of_a_stage_grows(step: int, stage: int, here: int) -> None:
    assert place(RUN, step, stage) == (stage, here, here > stage)


def test_stages_to_come_may_change() -> None:
    later = run(DEPTH, {**WIDTH, "until_steps": 6, "options": {"ffn_hidden_size": 160}, "lr_policy": "rewarm(2)"})
    assert place(later, 5, 1) == (1, 1, False)
    assert place(run(DEPTH), 8, 1) == (1, 1, False)
    assert place(run({**DEPTH, "until_steps": 5}, WIDTH), 4, 0) == (0, 0, False)
    assert place(run(DEPTH, {**WIDTH, "options": {"ffn_hidden_size": 160}}), 8, 1) == (1, 2, True)


def test_options_at_their_defaults_may_be_given_or_not() -> None:
    given = {"until_steps": 4, "operator": "g_stack"}
    assert place(run({**given, "options": {"factor": 4}}), 6, 1, of=run(given)) == (1, 1, False)


def test_a_run_without_stages_goes_on_with_some_and_the_reverse() -> None:
    assert place(run(DEPTH), 3, 0, of=run()) == (0, 0, False)
    assert place(run(DEPTH), 4, 0, of=run()) == (0, 1, True)
    # The configuration of a stage is that of a run that begins with its model, and may grow further.
    grown = stages_of(RUN)[1].config
    assert place(grown, 6, 1) == (0, 0, False)
    again = {**DEPTH, "until_steps": 6}
    further = grown.model_copy(update={"growth": run(again).growth})
    assert place(further, 6, 1) == (0, 1, True)


@pytest.mark.parametrize(
    ("stages", "step", "stage", "message"),
    [
        ((DEPTH,), 9, 2, r"its model has grown 2 times, but growth\.stages\[1\] is missing"),
        (({**DEPTH, "until_steps": 5}, WIDTH), 6, 1, r"stages\[0\] ended at step 4 there and ends at step 5 here"),
        (({**DEPTH, "operator": "grad_stack"},), 5, 1, r"stages\[0\]\.operator was 'midas' there and is 'grad_stack' "),
        (({**DEPTH, "options": {"block_size": 2}},), 5, 1, r"stages\[0\]\.options was {'block_size': 1} there and is "),
        (({**DEPTH, "moments": "fresh", "optimizer": "fresh"},), 5, 1, r"stages\[0\]\.moments was 'copy' there"),
        (({**DEPTH, "lr_policy": "rewarm(2)"},), 5, 1, r"stages\[0\]\.lr_policy was 'continue' there and is 'rewarm"),
        ((DEPTH, {**WIDTH, "options": {"ffn_hidden_size": 160}}), 9, 2, r"growth\.stages\[1\]\.options was"),
        (({**DEPTH, "until_steps": 3},), 4, 0, r"stages\[0\] ends at step 3, after which the run that saved it has n"),
        ((DEPTH, {**WIDTH, "until_steps": 6}), 8, 1, r"stages\[1\] ends at step 6, after which the run that saved it"),
    ],
)
def test_stages_that_have_begun_cannot_change(
    stages: tuple[dict[str, Any], ...], step: int, stage: int, message: str
) -> None:
    with pytest.raises(CheckpointError, match=f"^checkpoint global_step is at step {step}, and .*{message}") as caught:
        place(run(*stages), step, stage)
    assert "stages that have begun cannot change. Restore growth.stages" in str(caught.value)


def test_a_run_of_a_preset_is_extended_from_its_own_configuration(tmp_path: Path) -> None:
    file = Path(__file__).parents[2] / "examples/configs/study_growing.yaml"
    sizes = ("model.vocab_size=2048", "optim.lr_warmup_iters=2")
    ran = load_config(file, ("train.train_iters=18", *sizes), preset_named("midas"))
    written = tmp_path / "config.yaml"
    written.write_text(ran.to_yaml())
    longer = load_config(file, ("train.train_iters=36", *sizes), preset_named("midas"))
    with pytest.raises(CheckpointError, match=r"go on with the config\.yaml of the run's folder, without --preset"):
        place(longer, 5, 2, of=ran)
    assert place(load_config(written, ("train.train_iters=36",)), 5, 2, of=ran) == (2, 2, False)


STABLE, LONG, LAST = {"until_steps": 4}, {"until_steps": 8, "rotary_base": 5e5, "global_batch_size": 4}, {"min_lr": 0.0}
PHASED = small_config([STABLE, LONG, LAST], train={"train_iters": 12})


def past_problem(step: int, *phases: dict[str, Any], there: Config = PHASED, **sections: Any) -> str | None:
    """What is wrong with ``phases`` for a checkpoint of ``there`` at ``step``."""
    here = small_config(phases, train={"train_iters": 12, **sections.pop("train", {})}, **sections)
    try:
        check_past_phases(Path("global_step"), there, here, step)
    except CheckpointError as error:
        return str(error)
    return None


@pytest.mark.parametrize("step", [0, 4, 5, 8, 9])
def test_phases_that_are_unchanged_or_to_come_may_follow(step: int) -> None:
    assert past_problem(step, STABLE, LONG, LAST) is None
    assert past_problem(min(step, 8), STABLE, LONG, {"lr": 1e-5, "rotary_base": 1e6, "global_batch_size": 8}) is None
    assert past_problem(min(step, 4), STABLE, {}) is None


def test_a_phase_that_has_begun_may_end_at_another_step_to_come() -> None:
    assert past_problem(6, STABLE, {**LONG, "until_steps": 6}, {"global_batch_size": 8}) is None
    assert past_problem(6, STABLE, {**LONG, "until_steps": 10}, LAST) is None


@pytest.mark.parametrize(
    ("step", "phases", "said"),
    [
        (5, [STABLE, {**LONG, "rotary_base": 1e6}, LAST], "phases[1] has begun: rotary_base of step 5 was 500000.0"),
        (9, [STABLE, {**LONG, "global_batch_size": 2}, LAST], "phases[1] has begun: global_batch_size of step 5 was 4"),
        (6, [{"until_steps": 5}, LONG, LAST], "phases[0] has begun: global_batch_size of step 5 was 4 there and is 2"),
        (6, [{"until_steps": 3}, LONG, LAST], "phases[0] has begun: global_batch_size of step 4 was 2 there and is 4"),
        (
            9,
            [STABLE, LONG, {}],
            "phases[2] has begun: learning rate of step 9 was {'min_lr': 0.0} there and is null here",
        ),
        (5, [{**STABLE, "seq_length": 16}, LONG, LAST], "phases[0] has begun: seq_length of step 1 was 32 there and"),
        (5, [], "phases[1] has begun: global_batch_size of step 5 was 4 there and is 2 here"),
    ],
)
def test_a_phase_that_has_begun_cannot_change(step: int, phases: list[dict[str, Any]], said: str) -> None:
    problem = past_problem(step, *phases)
    assert problem is not None and said in problem, problem


def test_phases_can_be_given_to_a_run_that_had_none() -> None:
    before = small_config(train={"train_iters": 12})
    assert past_problem(6, {"until_steps": 6}, LAST, there=before) is None
    assert past_problem(6, {"until_steps": 4}, LONG, there=before, train={"train_iters": 8}) is not None
    assert past_problem(6, there=before, train={"global_batch_size": 8}) is None, "a run without phases may change it"
