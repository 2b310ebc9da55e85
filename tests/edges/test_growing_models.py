"""What tools/grow_checkpoint.py cannot do: one line, its exit code, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.checkpoints import grown_config, write_grown_checkpoint
from tests.helpers.commands import run_here, snapshot
from tests.helpers.deepspeed_files import STEP, odd_config, random_state, write_checkpoint, write_manifest
from tests.helpers.edges import in_every_encoding, refused

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
