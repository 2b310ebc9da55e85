"""Loading a checkpoint that was found whole: what is read, what continues, what stays this run's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.checkpoint.find import check_checkpoint
from megatron_sgt.checkpoint.load import _changes, load_checkpoint
from megatron_sgt.checkpoint.reshard.convert import convert
from megatron_sgt.checkpoint.reshard.rank_state import AVERAGE, MOMENTS, WEIGHTS
from megatron_sgt.config import Config
from megatron_sgt.errors import CheckpointError
from tests.helpers.checkpoints import ZERO_1
from tests.helpers.checkpoints import write_plain_checkpoint as make
from tests.helpers.deepspeed_files import STEP, State, odd_config, random_state, rank_state, write_checkpoint
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.resharding import begin_and_look
from tests.helpers.single import small_config


class Engine:
    """DeepSpeed's engine, as far as loading goes: overwrites its settings, as the real one does."""

    def __init__(self, outcome: Any) -> None:
        self.outcome = outcome
        self.checkpoint_engine: Any = None
        self.read: list[int] = []
        self.optimizer = SimpleNamespace(param_groups=[{"lr": 1e-3, "weight_decay": 0.1, "params": []}])

    def load_checkpoint(self, root: str, tag: str) -> tuple[str | None, None]:
        assert tag == "global_step7"
        self.optimizer.param_groups[0].update(lr=0.5, weight_decay=0.5)
        for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
            self.read.append(self.checkpoint_engine.load(f"{root}/{tag}/{name}", map_location="cpu")["step"])
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome, None


def load(folder: Path, outcome: Any) -> Engine:
    config, engine = small_config(deepspeed=ZERO_1), Engine(outcome)
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
    assert engine.read == [7, 7]
    assert engine.optimizer.param_groups == [{"lr": 1e-3, "weight_decay": 0.1, "params": []}]


@pytest.mark.parametrize("outcome", [None, RuntimeError("size mismatch"), OSError("gone"), AssertionError("ranks")])
def test_what_deepspeed_cannot_load_is_an_error(outcome: Any, tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    expected = "found nothing to load" if outcome is None else f"cannot be loaded: {outcome}"
    with pytest.raises(CheckpointError, match=expected):
        load(folder, outcome)


@pytest.mark.parametrize("name", [layout.rng_file(0), "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_files_that_cannot_be_read_are_an_error(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "global_step7")
    state = check_checkpoint(folder, small_config(deepspeed=ZERO_1))
    (folder / name).write_bytes(b"not a torch file")
    engine: Any = Engine("found")
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
        load_checkpoint(folder, state, small_config(deepspeed=ZERO_1), engine, fake_groups())
    assert engine.read == [], "no weight is touched before all is read"


def test_what_differs_between_layouts() -> None:
    """A side without a pipeline has no layers of stages to tell."""
    size, counts = layout.PIPELINE_SIZE, layout.PIPELINE_COUNTS
    there = {"data_parallel_size": 1, size: 2, counts: [3, 1]}
    here = {"data_parallel_size": 1, size: 4, counts: [1, 1, 1, 1], "optimizer": "BF16_Optimizer"}
    assert _changes(there, here) == f"{size} 2 -> 4, {counts} 3,1 -> 1,1,1,1, optimizer none -> BF16_Optimizer"
    assert _changes(there, {"data_parallel_size": 2}) == f"data_parallel_size 1 -> 2, {size} 2 -> 1"
    assert _changes({"data_parallel_size": 1}, {"data_parallel_size": 1}) == "same layout"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, dict[str, Any], State, State]]:
    """What two ranks see of new runs at each ZeRO stage, the named checkpoint's tensors, and those of the newest."""
    root, precision = tmp_path_factory.mktemp("begun"), {"train": {"micro_batch_size": 1, "global_batch_size": 6}}
    cases, states = list[tuple[Config, Path, str]](), list[tuple[State, State]]()
    sources = [(2, 1, 0), (1, 2, 1), (2, 2, 2), (1, 3, 3)]
    for zero, where in enumerate(sources):
        config = odd_config({**precision, "parallel": {"zero_stage": zero, "device": "cpu"}})
        older, newest = random_state(config, 1, averaged=True), random_state(config, 2)
        folder = write_checkpoint(root / str(zero), config, older, where)
        layout.point_to(root / str(zero), write_checkpoint(root / str(zero), config, newest, where, step=STEP + 2).name)
        cases.append((config, folder, "model"))
        states.append((older, newest))
    cases.append((cases[-1][0], convert(cases[0][1], root / "free")[0], "ema"))
    states.append(({**states[0][0], WEIGHTS: states[0][0][AVERAGE]}, states[0][0]))
    seen = run_on_ranks(2, begin_and_look, cases)[0]
    return [(case[2], look, *state) for case, look, state in zip(cases, seen, states, strict=True)]


@pytest.mark.parametrize("case", range(5))
def test_a_new_run_has_the_weights_of_the_named_checkpoint_and_a_new_optimizer(case: int, begun: Any) -> None:
    """DeepSpeed's own loading without optimizer states takes those of the newest checkpoint at ZeRO-3."""
    _, seen, older, newest = begun[case]
    wanted, other = (rank_state(odd_config(), state)[WEIGHTS] for state in (older, newest))
    for name, tensor in seen["state"][WEIGHTS].items():
        assert torch.equal(tensor, wanted[name]) and not torch.equal(tensor, other[name]), name
        assert torch.equal(seen["model"][name], wanted[name]), name
    for moment in MOMENTS:
        assert not any(tensor.any() for tensor in seen["state"][moment].values())
    assert set(seen["steps"]) == {0.0} and 0 < seen["norm"] < float("inf")
