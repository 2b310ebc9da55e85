"""A trajectory through all phases of growth, in every pipeline: against the reference, and against one process.

Losses to 1e-6, gradient norms to 1e-5 of themselves (AdamW and clipping hide a gradient of the wrong length in the
losses), entropies, events, weights. `make test` takes a few layouts, `make test-all` all of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers.exhaustive import share_of
from tests.helpers.pipelines import LIMITS, MINI, VARIANTS, Case, beyond, check_same, gaps, run_case, write_mini

BASES = [
    *(Case(zero=zero) for zero in (0, 1, 2)),
    Case(micro_batches=8),
    *(Case(pp=4, micro_batches=count) for count in (8, 4, 2)),
    Case(pp=4, layout="1,3,3,1"),
    *(Case(dp=2, zero=zero) for zero in (0, 1, 2)),
    *(Case(tp=2, sequence=sp, loop=loop) for sp in (False, True) for loop in ("owner", "balanced")),
    Case(tp=2, sequence=True, zero=2),
    *(Case(vp=2, zero=zero) for zero in (0, 1, 2)),
    Case(vp=2, layout="1,3,2,2"),
    Case(pp=4, vp=2, micro_batches=8),
    Case(vp=2, dp=2, zero=2),
    Case(vp=2, tp=2, sequence=True),
]
"""Every layout, with a share of the kinds of ZeRO."""
OTHERS = [
    *(replace(base, recompute=recompute) for base in BASES for recompute in ("selective", "full")),
    *(replace(base, variant="tied", recompute=how) for base, how in product(BASES, ("none", "full"))),
    *(replace(base, variant=kind) for kind in ("all heads", "block loop", "yarn", "olmo2")
      for base in (Case(), Case(pp=4, layout="1,3,3,1"), Case(tp=2, sequence=True), Case(vp=2))),
]  # fmt: skip
SHARE = [
    Case(pp=4, layout="1,3,3,1"),
    Case(dp=2, zero=2),
    Case(tp=2, sequence=True, loop="balanced"),
    Case(pp=4, vp=2, micro_batches=8),
    Case(vp=2, zero=1, recompute="full"),
    Case(zero=2, variant="tied"),
    Case(variant="block loop"),
]
BF16 = {"loss": 2e-4, "ema_entropy": 2e-4}

Trajectory = tuple[dict[str, Tensor], dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mini")


@pytest.fixture(scope="module")
def wanted(folder: Path) -> Callable[[str], Trajectory]:
    """By variant: what the reference makes of it. Its file lies in ``folder``."""
    made: dict[str, Trajectory] = {}

    def get(variant: str) -> Trajectory:
        if variant not in made:
            made[variant] = write_mini(folder / variant, variant)
        return made[variant]

    return get


@pytest.fixture(scope="module")
def alone(folder: Path, wanted: Any) -> Callable[..., Trajectory]:
    """By variant and precision: what one process makes of it."""
    made: dict[Case, Trajectory] = {}

    def get(variant: str, precision: str = "fp32") -> Trajectory:
        case = Case(pp=1, variant=variant, precision=precision)
        if case not in made:
            wanted(variant)
            (made[case],) = run_case(folder / variant, case)
        return made[case]

    return get


def check(case: Case, folder: Path, wanted: Any, alone: Any) -> None:
    tensors, meta = wanted(case.variant)
    by_rank = run_case(folder / case.variant, case)
    found = check_same(by_rank, tensors, meta)
    against_one = gaps(by_rank[0][0], alone(case.variant)[0])
    print(f"{case}: reference {words(found)}; one process {words(against_one)}")  # shown when a test fails
    assert beyond(found) == {} and beyond(against_one) == {}


def words(measured: dict[str, float]) -> str:
    return "  ".join(f"{name} {gap:.1e}" for name, gap in measured.items())


@pytest.mark.parametrize("case", share_of(dict.fromkeys([*BASES, *OTHERS]), SHARE), ids=str)
def test_every_layout_is_the_reference(case: Case, folder: Path, wanted: Any, alone: Any) -> None:
    check(case, folder, wanted, alone)


def test_the_trajectory_passes_all_phases(wanted: Any) -> None:
    """Else it proves nothing: gates fade, heads are kept, the structure is fixed, gradients are clipped."""
    tensors, meta = wanted("sgt")
    actions = [event["action"] for event in meta["events"]]
    assert actions == ["first_selection", "increase_depth", *["select_new_layer", "increase_depth"] * 2, "fixed"]
    grown = tensors["loop_depth"][-1].tolist()
    assert sorted(grown) == [0] * 5 + [2] * 3
    halves = [sum(grown[:4]), sum(grown[4:])]
    assert min(halves) > 0, "a stage of two has no loop"
    assert ((tensors["head_decay"] > 0) & (tensors["head_decay"] < 1)).any() and (tensors["head_decay"] == 0).any()
    assert tensors["grad_norm"].min() > 1.5 * MINI["optim"]["clip"]
    assert (tensors["grad_norm"] / tensors["grad_norm"].mean()).std() > 1e-2


@pytest.mark.parametrize("case", share_of([Case(), Case(vp=2), Case(pp=4)], [Case(vp=2)]), ids=str)
def test_replayed_growth(case: Case, folder: Path, wanted: Any, alone: Any) -> None:
    """Recorded decisions instead of measured ones: no entropy, the same model."""
    wanted("sgt")
    by_rank, path = alone("sgt"), folder / "events.json"
    path.write_text(json.dumps(by_rank[1]["events"]))
    found = run_case(folder / "sgt", replace(case, replay=str(path)))
    measured = gaps(found[0][0], by_rank[0])
    print(words(measured))
    assert torch.equal(found[0][0]["loop_depth"], by_rank[0]["loop_depth"])
    assert beyond({name: gap for name, gap in measured.items() if name != "ema_entropy"}) == {}


BF16_CASES = [
    *(Case(precision="bf16", zero=zero) for zero in (1, 2)),
    Case(precision="bf16", vp=2),
    Case(precision="bf16", recompute="full"),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", BF16_CASES, ids=str)
def test_bf16(case: Case, folder: Path, wanted: Any, alone: Any) -> None:
    """Stages round at the same places as one rank."""
    one, _ = alone(case.variant, "bf16")
    found, _ = run_case(folder / case.variant, case)[0]
    measured = gaps(found, one)
    print(words(measured))
    assert torch.equal(found["loop_depth"], one["loop_depth"])
    assert beyond({name: measured[name] for name in BF16}, BF16) == {} and measured["grad_norm"] <= 1e-3
    exact, _ = wanted(case.variant)
    assert (one["loss"] - exact["loss"]).abs().max() > 1e-4, "it did not run in bf16"


@pytest.mark.exhaustive
def test_tied_bf16_is_as_near_to_fp32_as_one_rank(folder: Path, wanted: Any, alone: Any) -> None:
    """The shared weight's two gradients are added once per step in fp32; one rank adds them per micro-batch in bf16."""
    exact, _ = wanted("tied")
    one, _ = alone("tied", "bf16")
    found, _ = run_case(folder / "tied", Case(precision="bf16", variant="tied"))[0]
    by_stages, by_one = gaps(found, exact), gaps(one, exact)
    print(words(by_stages), words(by_one))
    assert torch.equal(found["loop_depth"], one["loop_depth"])
    assert found["loss"][:2].tolist() == one["loss"][:2].tolist()
    for name in ("loss", "ema_entropy", "grad_norm"):
        assert by_stages[name] <= 1.25 * by_one[name], name


def test_the_matrix_is_whole() -> None:
    cases = {*BASES, *OTHERS}
    assert {*SHARE} <= cases and len(cases) > 80
    assert {case.variant for case in cases} == {*VARIANTS}
    assert {(case.pp, case.vp) for case in cases} == {(2, 1), (4, 1), (2, 2), (4, 2)}
    assert LIMITS["loss"] <= 1e-6 and LIMITS["grad_norm"] <= 1e-5
