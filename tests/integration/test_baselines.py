"""Baselines and ablations train from one file; a replayed run is the recorded one, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from megatron_sgt.config.presets import BASELINES
from megatron_sgt.metrics import METRICS_FILE
from tests.helpers.ranks import run_on_ranks
from tests.helpers.runs import TINY, measured_steps, pretrain, reported, tiny_config, write_tiny_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def runs(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run per preset."""
    folder = tmp_path_factory.mktemp("runs")
    for name, preset in BASELINES.items():
        growth = {**TINY["growth"], **preset(TINY["model"]["num_layers"])}
        run_on_ranks(1, pretrain, tiny_config(folder / name, data, growth=growth, checkpoint={"save_interval": 0}))
    return folder


def losses(folder: Path) -> list[float]:
    return [step["loss"] for step in measured_steps(folder)]


def test_same_data_and_weights_until_they_differ(runs: Path) -> None:
    first_selection = TINY["growth"]["first_selection_step"]
    plain = losses(runs / "vanilla")
    for name in BASELINES:
        found = losses(runs / name)
        assert len(found) == len(plain)
        if name.startswith("block"):
            assert found[0] != plain[0]
        else:
            assert found[:first_selection] == plain[:first_selection], name
            assert (found[first_selection] != plain[first_selection]) == (name != "vanilla"), name


def test_each_is_what_its_name_says(runs: Path) -> None:
    def first(name: str) -> Any:
        event = reported(runs / name, "growth")[0]
        return event["layer"], event["kept_heads"][str(event["layer"])], event["ema_entropy"][event["layer"]]

    layer, kept, entropy = first("sgt")
    ranked = sorted(range(4), key=lambda head: -entropy[head])
    assert kept == sorted(ranked[:2])
    assert first("sgt-lowest-heads")[1] == sorted(ranked[2:])
    assert first("sgt-all-heads")[1] == [0, 1, 2, 3]
    assert first("sgt-shallow-first")[0] <= layer
    assert reported(runs / "vanilla", "growth") == reported(runs / "block-loop-3", "growth") == []


def test_a_replayed_run_is_the_recorded_run(runs: Path, data: str, tmp_path: Path) -> None:
    growth = {**TINY["growth"], "replay": str(runs / "sgt" / METRICS_FILE)}
    run_on_ranks(1, pretrain, tiny_config(tmp_path / "again", data, growth=growth))
    assert losses(tmp_path / "again") == losses(runs / "sgt")
    shared = ("step", "action", "layer", "kept_heads", "loop_depth", "phase")
    one, two = (
        [{key: event[key] for key in shared} for event in reported(folder, "growth")]
        for folder in (runs / "sgt", tmp_path / "again")
    )
    assert one == two


def test_a_replayed_run_grows_where_the_recorded_one_did(data: str, tmp_path: Path) -> None:
    """Decisions before and after the model grows, in the numbers of the layers of each stage."""
    growth = {**TINY["growth"], "stages": [{"until_steps": 7, "operator": "g_stack", "options": {"factor": 2}}]}
    less: dict[str, Any] = {"train": {"train_iters": 10, "eval_interval": 0}}
    run_on_ranks(1, pretrain, tiny_config(tmp_path / "once", data, growth=growth, **less))
    replay = {**growth, "replay": str(tmp_path / "once" / METRICS_FILE)}
    run_on_ranks(1, pretrain, tiny_config(tmp_path / "again", data, growth=replay, **less))
    assert losses(tmp_path / "again") == losses(tmp_path / "once")
    for kind in ("growth", "grow"):
        one, two = (
            [(e["step"], e.get("action"), e["kept_heads"], e["loop_depth"]) for e in reported(tmp_path / name, kind)]
            for name in ("once", "again")
        )
        assert one == two
    steps = [event["step"] for event in reported(tmp_path / "once", "growth")]
    assert min(steps) <= 7 < max(steps)
