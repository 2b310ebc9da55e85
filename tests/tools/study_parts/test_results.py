"""Tables and verdicts from outcomes; which runs count as finished."""

import math
from pathlib import Path

import pytest
from study_parts.results import (
    Claim,
    Outcome,
    judge,
    markdown,
    outcome_of,
    rows_of,
    times_markdown,
)

from megatron_sgt.jsonl import encode

CLAIM = Claim("a is better", "a", "b")
CHEAP = Claim("a costs at most 3 % more", "a", "b", 0.03)


def outcome(preset: str, seed: int, loss: float, flops: float = 100.0, seconds: float = 1.0) -> Outcome:
    return Outcome(preset, seed, loss, flops, seconds)


def test_rows_compare_equal_seeds() -> None:
    found = [
        outcome("vanilla", 1, math.log(10.0)), outcome("sgt", 1, math.log(8.0), 102.0, 1.5),
        outcome("vanilla", 2, math.log(14.0), 50.0, 2.0), outcome("sgt", 2, math.log(12.0), 52.0, 2.0),
        outcome("sgt", 3, math.log(10.0)),
    ]  # fmt: skip
    vanilla, sgt = rows_of(found)
    assert (vanilla.preset, vanilla.seeds, vanilla.perplexity) == ("vanilla", 2, pytest.approx(12.0))
    assert vanilla.perplexity_error == pytest.approx(2.0)  # standard deviation 2.83 over the root of 2
    assert (vanilla.flops_overhead, vanilla.time_overhead) == (0.0, 0.0)
    assert sgt.seeds == 3 and sgt.perplexity == pytest.approx(10.0)
    assert sgt.flops_overhead == pytest.approx(0.03) and sgt.time_overhead == pytest.approx(0.25)


def test_without_vanilla_or_with_one_seed_nothing_is_invented() -> None:
    (row,) = rows_of([outcome("sgt", 1, 2.0)])
    assert row.flops_overhead is None and row.time_overhead is None and row.perplexity_error is None
    assert "| sgt | 1 |  | 7.389 |" in markdown([outcome("sgt", 1, 2.0)], "note", ())


def judged(claim: Claim, gaps: tuple[float, ...], flops: float = 102.0) -> tuple[str, str]:
    found = [outcome("b", seed, 4.0) for seed in range(12)]
    found += [outcome("a", seed, 4.0 + gap, flops) for seed, gap in enumerate(gaps)]
    return judge(claim, found)


@pytest.mark.parametrize(
    ("gaps", "verdict"),
    [
        ((-0.10, -0.11, -0.12), "seen"),
        ((0.10, 0.11, 0.12), "not seen"),
        ((-0.10, 0.11, -0.02), "undecided"),
        # 21 standard errors for two seeds, of which 12.7 would be enough; then 7.
        ((-0.10, -0.11), "seen"),
        ((-0.10, -0.13), "undecided"),
        # One standard deviation from 0 is too little for three seeds (4.3 standard errors), enough for twelve (2.2).
        ((-0.1, -0.2, 0.0), "undecided"),
        ((-0.1, -0.2, 0.0) * 4, "seen"),
        ((-0.10,), "undecided"),
        ((), "undecided"),
    ],
)
def test_verdicts(gaps: tuple[float, ...], verdict: str) -> None:
    assert judged(CLAIM, gaps)[0] == verdict


@pytest.mark.parametrize(("flops", "verdict"), [(102.5, "seen"), (104.0, "not seen")])
def test_a_bound_on_flops_is_judged_by_flops_alone(flops: float, verdict: str) -> None:
    assert judged(CHEAP, (0.1,), flops) == (verdict, f"FLOPs +{flops - 100:.2f} %")
    assert judged(CLAIM, (-0.10, -0.11, -0.12), flops) == ("seen", "loss -0.1100 ± 0.0058 over 3 seeds")


def test_pages_name_the_claims_that_can_be_judged() -> None:
    found = [outcome("vanilla", 1, 2.0), outcome("sgt", 1, 1.9, 102.0, 1.04)]
    claims = (Claim("it is cheap", "sgt", "vanilla", 0.03), Claim("it beats another", "sgt", "another"))
    page = markdown(found, "what was trained", claims)
    assert "what was trained" in page and "| sgt | 1 | +2.00 % | 6.686 |" in page
    assert "| it is cheap | seen | FLOPs +2.00 % |" in page and "another" not in page
    assert "+4.00 %" in times_markdown(found, "side by side") and "+4.00 %" not in page


def test_pages_say_what_each_preset_trains() -> None:
    found = [outcome("vanilla", 1, 2.0), outcome("midas", 1, 1.9, 101.0)]
    page = markdown(found, "note", (), {"vanilla": "8 layers: 200", "midas": "4 layers: 20, 8 layers: 190"})
    assert "| midas | 4 layers: 20, 8 layers: 190 | 1 | +1.00 % | 6.686 |" in page


def lines(last_step: int, valid_at: int) -> str:
    train = [
        encode(
            "train",
            {"step": s, "train_iters": 4, "loss": 3.0, "step_time_s": s, "model_flops_per_step": 10.0},
        )
        for s in range(1, last_step + 1)
    ]
    return "\n".join([*train, encode("valid", {"step": valid_at, "loss": 2.5}), ""])


def test_which_runs_are_finished(tmp_path: Path) -> None:
    assert outcome_of(tmp_path, "sgt", 1) is None
    for text, finished in ((lines(3, 3), False), (lines(4, 2), False), (lines(4, 4), True)):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert (outcome_of(tmp_path, "sgt", 1) is not None) == finished
    assert outcome_of(tmp_path, "sgt", 1) == Outcome("sgt", 1, 2.5, 40.0, 3.5)
