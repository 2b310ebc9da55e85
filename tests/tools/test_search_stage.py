"""tools/search_stage.py as a user starts it: its table and the entry it gives; what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_sgt.config import load_config
from tests.helpers.commands import Finished, run_script, snapshot
from tests.helpers.deepspeed_files import random_state, write_checkpoint
from tests.helpers.runs import tiny_config, write_tiny_data

SCRIPT = "tools/search_stage.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkpoint in from/, of weights so large that a second copy of a layer changes much."""
    made = tmp_path_factory.mktemp("search")
    growth = {"method": "vanilla"}
    config = tiny_config(made / "run", write_tiny_data(made), model={"num_layers": 3}, growth=growth)
    write_checkpoint(made / "from", config, random_state(config), (1, 1, 1))
    return made


def refused(folder: Path, *arguments: str) -> Finished:
    before = snapshot(folder)
    done = run_script(SCRIPT, ["--load", "from", "--steps", "2", *arguments], folder)
    assert snapshot(folder) == before and done.out == ""
    return done


def test_prints_the_table_and_the_entry(folder: Path) -> None:
    before = snapshot(folder / "from")
    done = run_script(SCRIPT, ["--load", "from", "--depths", "4,5,6", "--steps", "4", "optim.lr=1e-3"], folder)
    assert (done.code, done.err) == (0, "")
    assert snapshot(folder / "from") == before
    assert "3 layers; 6 are made of its weights (the run keeps no average of them)" in done.out
    assert "step 4 of 4: loss " in done.out and done.out.count("<- lowest") == 1
    best = next(int(line.split()[0]) for line in done.out.splitlines() if line.endswith("<- lowest"))
    entry = yaml.safe_load(done.out[done.out.index("growth:\n") :])
    assert f"grow to {best} layers:" in done.out
    (stage,) = load_config(
        folder / "from/global_step7/config.yaml", [f"growth.stages={entry['growth']['stages']}"]
    ).growth.stages
    assert (stage.until_steps, stage.operator, stage.options) == (7, "auto_prog", {"num_layers": best})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--depths", "3,4,7"], "depths 3,4,7: a model of 3 layers has candidates of 3 to 6 layers"),
        (
            ["--depths", "3,4,6", "model.num_layers=4"],
            "model.num_layers=4: model and growth are those of the checkpoint",
        ),
        (
            ["--depths", "3,4,6", "phases=[{until_steps: 2}, {lr: 1e-4}]"],
            "phases: a search trains with one batch, blend and learning-rate curve; give phases=[] and what holds",
        ),
        (["--depths", "3,4,6", "train.micro_batch_size=3"], "train.global_batch_size"),
        (["--depths", "3,4,6", "train.train_iters=8"], "train.train_iters 8: ends before step 9"),
        (["--depths", "2,x"], "must be numbers of layers, as 6,9,12, got '2,x'"),
    ],
)
def test_refusals(arguments: list[str], message: str, folder: Path) -> None:
    done = refused(folder, *arguments)
    assert done.code == 2 and message in done.err
