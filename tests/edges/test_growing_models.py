"""Growing models: what tools/grow_checkpoint.py, and a run with stages, cannot do: one line, its exit code, nothing
written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.checkpoint.layout import STAGES_STATE, STATE_FILE, read_json, tag_for, write_json
from megatron_sgt.config import Config, load_config
from megatron_sgt.config.yaml_io import dump_yaml
from megatron_sgt.stages.stages import stage_after, stages_of
from tests.helpers.checkpoints import grown_config, write_grown_checkpoint, write_plain_checkpoint
from tests.helpers.commands import Finished, run_here, run_script, snapshot
from tests.helpers.deepspeed_files import STEP, odd_config, random_state, write_checkpoint, write_manifest
from tests.helpers.edges import in_every_encoding, refused
from tests.helpers.runs import TINY, write_tiny_data

SCRIPT = "tools/grow_checkpoint.py"
G_STACK = ["--operator", "g_stack", "--factor", "2"]
ROOT = "läufe"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "looping" has looping layers, "plain" has none and grouped heads."""
    root = tmp_path_factory.mktemp("checkpoints")
    write_grown_checkpoint(root / "looping", (2, 1, 1))
    plain = odd_config({"optim": {"adam_beta2": 0.999, "lr": 1e-3}}, num_query_groups=2)
    write_checkpoint(root / "plain", plain, random_state(plain), (1, 1, 0))
    return root


@pytest.fixture
def place(checkpoints: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoints, tmp_path / ROOT)
    return tmp_path


def damage_shape(root: Path) -> None:
    """A checkpoint whose files hold a model of another shape than its configuration."""
    shutil.rmtree(root / "plain")
    config = odd_config(ffn_hidden_size=24)
    folder = write_checkpoint(root / "plain", odd_config(), random_state(odd_config()), (1, 1, 0))
    (folder / "config.yaml").write_text(config.to_yaml())
    remake_manifest(folder)


def lose_a_file(root: Path) -> None:
    (root / f"plain/global_step{STEP}/sgt_state.json").unlink()


def replay(root: Path) -> None:
    """A checkpoint whose run repeats another one's growth."""
    folder = root / f"looping/global_step{STEP}"
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("replay: null", "replay: other/metrics.jsonl"))
    remake_manifest(folder)


def measured_late(root: Path) -> None:
    """A checkpoint just before a decision, of a run that measures just before decisions alone."""
    folder = root / f"looping/global_step{STEP}"
    for name in ("config.yaml", "sgt_state.json"):
        text = (folder / name).read_text()
        text = text.replace("exact_ema: true", "exact_ema: false").replace('"exact_ema": true', '"exact_ema": false')
        (folder / name).write_text(text)
    remake_manifest(folder)


def remake_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    write_manifest(folder)


CASES: dict[str, tuple[str, list[str], Callable[[Path], None] | None, int, str]] = {
    "depth_not_divisible": ("plain", ["--operator", "midas", "--block-size", "3"], None, 2, r"num_layers 2 is no"),
    "odd_block": ("looping", ["--operator", "lidas", "--block-size", "1"], None, 2, r"lidas: block_size 1 is odd"),
    "too_deep": ("plain", ["--operator", "auto_prog", "--num-layers", "5"], None, 2, r"from 2 layers .* to 3 to 4"),
    "unknown_operator": ("plain", ["--operator", "g_stak"], None, 2, r"invalid choice: 'g_stak'"),
    "foreign_option": ("plain", [*G_STACK, "--block-size", "2"], None, 2, r"--block-size: has no effect .* --factor"),
    "no_factor": ("plain", ["--operator", "g_stack", "--factor", "0"], None, 2, r"g_stack: factor: must be > 1, got 0"),
    "factor_is_text": ("plain", ["--operator", "g_stack", "--factor", "two"], None, 2, r"argument --factor"),
    "nothing_grows": ("plain", ["--operator", "msg"], None, 2, r"msg: num_layers: nothing grows"),
    "smaller": ("plain", ["--operator", "msg", "--ffn-hidden-size", "8"], None, 2, r"8: is below the 20"),
    "heads_do_not_fit": ("plain", ["--operator", "msg", "--num-attention-heads", "5"], None, 2, r"multiple of the 2"),
    "moves_a_kept_head": (
        "looping", ["--operator", "msg", "--num-attention-heads", "8", "--num-query-groups", "4"], None, 2,
        r"heads \[1, 2, 3\] are kept by looping layers .*; let num_query_groups grow in proportion",
    ),
    "no_multiple_of_groups": (
        "looping", ["--operator", "msg", "--num-attention-heads", "6", "--num-query-groups", "4"], None, 2,
        r"num_query_groups: num_attention_heads 6 is not a multiple of num_query_groups 4",
    ),
    "moments_too_late": (
        "plain", ["--operator", "msg", "--num-layers", "3"], None, 2, r"adam_beta2 0\.999.*choose optimizer rewind",
    ),
    "step_reset": ("plain", [*G_STACK, "--moments", "copy"], None, 2, r"optimizer fresh with moments copy"),
    "unknown_policy": ("plain", [*G_STACK, "--optimizer", "rewind(-1)"], None, 2, r"'rewind\(-1\)': must be continue"),
    "replay": ("looping", G_STACK, replay, 2, r"growth\.replay: other/metrics\.jsonl names layers"),
    "measured_late": ("looping", G_STACK, measured_late, 2, r"growth\.exact_ema: is false, and the decision of step 8"),
    "another_shape": ("plain", G_STACK, damage_shape, 4, r"unexpected parameters or shapes"),
    "damaged": ("plain", G_STACK, lose_a_file, 4, r"is damaged: sgt_state\.json is missing"),
    "no_average": ("plain", [*G_STACK, "--weights", "ema"], None, 4, r"holds no average of the weights"),
    "weights_of_what": ("plain", [*G_STACK, "--weights", "mean"], None, 2, r"argument --weights: invalid choice"),
    "no_checkpoint": ("nowhere", G_STACK, None, 4, r"no checkpoint at"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_line(case: str, place: Path) -> None:
    load, arguments, prepare, code, said = CASES[case]
    if prepare is not None:
        prepare(place / ROOT)
    before = snapshot(place)
    done = run_here(SCRIPT, ["--load", f"{ROOT}/{load}", *arguments, "--output", "grown"], place)
    refused(done, code, said)
    assert snapshot(place) == before


def test_what_exists_is_not_replaced(place: Path) -> None:
    (place / "grown").mkdir()
    arguments = ["--load", f"{ROOT}/plain", *G_STACK, "--output", "grown"]
    refused(run_here(SCRIPT, arguments, place), 4, "grown exists already")
    (place / "file").write_text("")
    before = snapshot(place)
    refused(run_here(SCRIPT, [*arguments[:-1], "file/grown"], place), 4, "file/grown cannot be written")
    assert snapshot(place) == before


def test_terminals_of_any_encoding(place: Path) -> None:
    arguments = ["--load", f"{ROOT}/plain", "--operator", "midas", "--output", "gröwn"]
    in_every_encoding(SCRIPT, arguments, place, 2, "midas: num_layers 2")


def test_the_looping_checkpoint_has_what_the_cases_rest_on() -> None:
    model = grown_config().model
    assert (model.num_attention_heads, model.num_query_groups, model.num_layers) == (4, 4, 4)


# A run whose model grows: refused by all that would start it, wait for it or plan it.

RUN = "pretrain_sgt.py"
STARTERS: dict[str, tuple[str, list[str]]] = {
    "run": (RUN, []),
    "dry run": (RUN, ["--dry-run"]),
    "plan": ("tools/plan.py", []),
    "submit": ("tools/submit_slurm.py", ["--nodes", "1", "--tasks-per-node", "1", "--dry-run"]),
}
BLOCKS: dict[str, Any] = {"options": {"block_size": 1}}
HEADS = {"num_attention_heads": 8, "num_query_groups": 2}
Sections = dict[str, dict[str, Any]]


def at(step: int, operator: str = "midas", **settings: Any) -> dict[str, Any]:
    """A stage that ends after ``step``."""
    return {"until_steps": step, "operator": operator, **settings}


REFUSED: dict[str, tuple[list[dict[str, Any]], Sections, str]] = {
    "depth_not_divisible": ([at(5, options={"block_size": 3})], {}, r"midas: num_layers 5 is no multiple"),
    "unknown_operator": ([at(5, "g_stak")], {}, r"operator 'g_stak': .* did you mean 'g_stack'"),
    "unknown_option": ([at(5, "g_stack", options={"factr": 2})], {}, r"g_stack: .*factr"),
    "not_ascending": ([at(5, **BLOCKS), at(5, **BLOCKS)], {}, r"stages\[1\]: ends at step 5, which is not after"),
    "after_the_end": ([at(18, **BLOCKS)], {}, r"ends at step 18, but the run at train\.train_iters 18"),
    "no_end": ([{"operator": "midas"}], {}, r"until_steps: give it or until_tokens"),
    "far_rewind": ([at(5, **BLOCKS, lr_policy="rewind(5)")], {}, r"lr_policy rewind\(5\): must name a step before 5"),
    "late_zeros": (
        [at(5, "msg", options={"ffn_hidden_size": 64})], {"optim": {"adam_beta2": 0.999}},
        r"adam_beta2 0\.999.*choose optimizer rewind",
    ),
    "no_average": ([at(5, **BLOCKS, weights="ema")], {}, r"weights ema: .*set train\.ema_decay"),
    "heads_that_may_be_kept": (
        [at(5, "msg", options=HEADS)], {"model": {"num_query_groups": 2}}, r"heads \[2, 3\] would get other numbers",
    ),
    "measured_late": (
        [at(5, **BLOCKS)], {"growth": {"exact_ema": False, "first_selection_step": 10}}, r"exact_ema: is false",
    ),
    "few_layers": ([at(5, **BLOCKS)], {"model": {"num_layers": 3}}, r"top_k_layers: 3 is above the 2 layers"),
    "nvme": (
        [at(5, **BLOCKS)],
        {"deepspeed": {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}},
        r"growth\.stages: .*offload_optimizer\.device is nvme",
    ),
    "fp16": (
        [at(5, **BLOCKS)], {"train": {"precision": "fp16"}, "parallel": {"device": "cpu", "zero_stage": 1}},
        r"fp16 needs a GPU",
    ),
    "unknown_optimizer": ([at(5, **BLOCKS)], {"optim": {"optimizer": "lion"}}, r"lion"),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


def write_run(folder: Path, data: str, stages: list[dict[str, Any]], sections: Sections) -> None:
    """run.yaml: the tiny run with these stages; its results would go to ``folder``/out."""
    ours: Sections = {
        "growth": {"stages": stages},
        "data": {"data_path": [data], "data_cache_path": f"{data}_cache"},
        "logging": {"run_dir": str(folder / "out")},
    }
    values = {}
    for name in {*TINY, *ours, *sections}:
        values[name] = {**TINY.get(name, {}), **ours.get(name, {}), **sections.get(name, {})}
    (folder / "run.yaml").write_text(dump_yaml(values))


def started(folder: Path, how: str) -> Finished:
    script, arguments = STARTERS[how]
    run = run_script if script == RUN else run_here
    return run(script, ["--config", "run.yaml", *arguments], folder)


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_is_refused_by_all_that_look_at_it(case: str, data: str, tmp_path: Path) -> None:
    stages, sections, said = REFUSED[case]
    write_run(tmp_path, data, stages, sections)
    before = snapshot(tmp_path)
    for how in STARTERS:
        refused(started(tmp_path, how), 2, said)
    assert snapshot(tmp_path) == before


def test_heads_of_a_later_stage_that_the_ranks_do_not_divide(data: str, tmp_path: Path) -> None:
    stages = [at(5, "msg", options={"num_attention_heads": 5, "num_query_groups": 5})]
    layout = {"device": "cpu", "tensor_model_parallel_size": 2}
    write_run(tmp_path, data, stages, {"growth": {"method": "vanilla", "stages": stages}, "parallel": layout})
    before = snapshot(tmp_path)
    for how in ("dry run", "plan"):
        refused(started(tmp_path, how), 2, r"stages\[0\]: .*model\.num_attention_heads: 5 is not a multiple")
    assert snapshot(tmp_path) == before


def of_another_shape(config: Config) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update={"hidden_size": 64})})


def of_another_past(config: Config) -> Config:
    first, *rest = config.growth.stages
    stages = (first.model_copy(update={"until_steps": 3}), *rest)
    return config.model_copy(update={"growth": config.growth.model_copy(update={"stages": stages})})


CHECKPOINTS: dict[str, tuple[Callable[[Config], Config], int, dict[str, Any], str]] = {
    "another_shape": (of_another_shape, 7, {}, r"model\.hidden_size is 64 there and 32 here"),
    "changed_past": (of_another_past, 7, {}, r"growth\.stages\[0\] ended at step 3 there and ends at step 5 here"),
    "no_average": (
        lambda config: config,
        5,
        {"weights": "ema"},
        r"holds no average of the weights.*growth\.stages\[0\]",
    ),
}
"""As which run a checkpoint was saved, after which step, settings of the stage, what is said of it."""


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_that_is_not_of_these_stages(case: str, data: str, tmp_path: Path) -> None:
    change, step, settings, said = CHECKPOINTS[case]
    sections: Sections = {"train": {"ema_decay": 0.5}} if settings else {}
    write_run(tmp_path, data, [at(5, **BLOCKS, **settings)], sections)
    stages = stages_of(change(load_config(tmp_path / "run.yaml")))
    there = stage_after(stages, step - 1)
    folder = write_plain_checkpoint(tmp_path / "out/checkpoints" / tag_for(step), **there.config.model_dump())
    state = read_json(folder / STATE_FILE)
    write_json(folder / STATE_FILE, {**state, STAGES_STATE: [stage.record() for stage in stages[1 : there.index + 1]]})
    remake_manifest(folder)
    before = snapshot(tmp_path)
    for how in ("run", "dry run", "submit"):
        refused(started(tmp_path, how), 4, said)
        assert snapshot(tmp_path) == before, how
