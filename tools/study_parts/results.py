"""What the runs of a study show: the table, and whether the order that the sources report is seen.

Perplexities and FLOPs follow from configuration and seed. On a CPU with one thread per rank they are reproducible
to the digit; times are not, and stand in a table of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Literal

from megatron_sgt.errors import DataError
from megatron_sgt.reporting.run_data import load_run

Verdict = Literal["seen", "not seen", "undecided"]


@dataclass(frozen=True)
class Outcome:
    """How one run ended. ``flops``: of the whole run; ``step_seconds``: median of its last half."""

    preset: str
    seed: int
    valid_loss: float
    flops: float
    step_seconds: float


@dataclass(frozen=True)
class Row:
    """One preset over its seeds. Overheads are fractions over vanilla of the same seeds, None without vanilla.

    ``perplexity_error``: standard error of the mean; None with a single seed.
    """

    preset: str
    seeds: int
    perplexity: float
    perplexity_error: float | None
    flops_overhead: float | None
    time_overhead: float | None


@dataclass(frozen=True)
class Claim:
    """A source reports that ``better`` has the lower validation loss; with a bound, that its FLOPs stay within it."""

    text: str
    better: str
    worse: str
    max_flops_overhead: float | None = None


# Student's t for 95 % on both sides, by degrees of freedom from 1; the last one stands for more, on the safe side.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def outcome_of(run_dir: Path, preset: str, seed: int) -> Outcome | None:
    """The outcome of a run that has reached its last step and validated there; None if it has not."""
    try:
        run = load_run(run_dir)
    except DataError:
        return None
    train, valid = run.of_kind("train"), run.of_kind("valid")
    _, flops = run.cumulative("model_flops_per_step")
    if not train or not valid or train[-1]["step"] != train[-1].get("train_iters"):
        return None
    if valid[-1]["step"] != train[-1]["step"] or "loss" not in valid[-1]:
        return None
    _, seconds = run.series("train", "step_time_s")
    late = seconds[len(seconds) // 2 :]
    return Outcome(preset, seed, float(valid[-1]["loss"]), float(flops[-1]), float(median(late)))


def rows_of(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row per preset, in the order in which they first appear."""
    presets = list(dict.fromkeys(o.preset for o in outcomes))
    base = {o.seed: o for o in outcomes if o.preset == "vanilla"}
    return [_row(preset, [o for o in outcomes if o.preset == preset], base) for preset in presets]


def _row(preset: str, runs: Sequence[Outcome], base: Mapping[int, Outcome]) -> Row:
    perplexities = [math.exp(o.valid_loss) for o in runs]
    pairs = [(o, base[o.seed]) for o in runs if o.seed in base]
    return Row(
        preset=preset,
        seeds=len(runs),
        perplexity=mean(perplexities),
        perplexity_error=stdev(perplexities) / math.sqrt(len(runs)) if len(runs) > 1 else None,
        flops_overhead=mean(o.flops / b.flops for o, b in pairs) - 1 if pairs else None,
        time_overhead=mean(o.step_seconds / b.step_seconds for o, b in pairs) - 1 if pairs else None,
    )


def judge(claim: Claim, outcomes: Sequence[Outcome]) -> tuple[Verdict, str]:
    """(verdict, reason) from the differences between runs of equal seed, which share the order of the data.

    Initial weights, too, where the models begin alike; a model that grows begins with those of a smaller one.

    "seen" or "not seen" when 0 lies outside of the 95 % confidence interval (Student's t) of the mean difference in
    loss, "undecided" otherwise and with fewer than two seeds. FLOPs follow from the configuration: no interval.
    """
    by = {(o.preset, o.seed): o for o in outcomes}
    seeds = sorted(s for p, s in by if p == claim.better and (claim.worse, s) in by)
    pairs = [(by[claim.better, s], by[claim.worse, s]) for s in seeds]
    if not pairs:
        return "undecided", "no pair of finished runs with the same seed"
    extra = mean(a.flops / b.flops for a, b in pairs) - 1
    if claim.max_flops_overhead is not None:
        return ("seen" if extra <= claim.max_flops_overhead else "not seen"), f"FLOPs {_percent(extra)}"
    gaps = [a.valid_loss - b.valid_loss for a, b in pairs]
    if len(gaps) < 2:
        return "undecided", f"one seed: loss {gaps[0]:+.4f}"
    error = stdev(gaps) / math.sqrt(len(gaps))
    half = error * _T_95[min(len(gaps) - 1, len(_T_95)) - 1]
    text = f"loss {mean(gaps):+.4f} ± {error:.4f} over {len(gaps)} seeds"
    if mean(gaps) < -half:
        return "seen", text
    return ("not seen" if mean(gaps) > half else "undecided"), text


def markdown(
    outcomes: Sequence[Outcome], note: str, claims: Sequence[Claim], trains: Mapping[str, str] | None = None
) -> str:
    """The study as a page of Markdown.

    Args:
        note: what was trained, in a sentence.
        trains: what each preset trains, in a few words; None: its name says it.
    """
    rows, trains = rows_of(outcomes), trains or {}
    head = ["preset", *(["trained steps"] if trains else []), "seeds", "FLOPs of the run over vanilla"]
    head.append("validation perplexity, mean ± standard error")
    lines = ["# Study", "", note, "", _cells(head), _cells(["---"] * len(head))]
    for row in rows:
        error = "" if row.perplexity_error is None else f" ± {row.perplexity_error:.3f}"
        steps = [trains[row.preset]] if trains else []
        flops = _percent(row.flops_overhead)
        lines.append(_cells([row.preset, *steps, str(row.seeds), flops, f"{row.perplexity:.3f}{error}"]))
    lines += ["", "| the sources' order | at this size | measured |", "| --- | --- | --- |"]
    presets = {row.preset for row in rows}
    for claim in (claim for claim in claims if {claim.better, claim.worse} <= presets):
        lines.append(_cells([claim.text, *judge(claim, outcomes)]))
    return "\n".join(lines) + "\n"


def times_markdown(outcomes: Sequence[Outcome], note: str) -> str:
    """The measured times, which no two executions share. ``note``: how the runs shared the machine."""
    lines = ["# Measured time", "", note, "", "| preset | time per step over vanilla |", "| --- | --- |"]
    lines += [_cells([row.preset, _percent(row.time_overhead)]) for row in rows_of(outcomes)]
    return "\n".join(lines) + "\n"


def _cells(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:+.2f} %"
