"""What the stages of a run cost: each for itself, and the run over all of them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from megatron_sgt.arch.attended_pairs import AttendedPairs
from megatron_sgt.config import Config
from megatron_sgt.growth import LoopPlan
from megatron_sgt.planning.boundary import boundary_time
from megatron_sgt.planning.flops import flops_between
from megatron_sgt.planning.kept import kept_steps
from megatron_sgt.planning.parameters import checkpoint_bytes, parameter_count
from megatron_sgt.planning.pipeline import describe_cut
from megatron_sgt.planning.rank_memory import peak_memory
from megatron_sgt.planning.step_time import Machine
from megatron_sgt.planning.structure import Stretch, stage_timelines, timeline
from megatron_sgt.stages.growth import WIDTHS
from megatron_sgt.stages.stages import Stage, stages_of
from megatron_sgt.stages.timing import fitted_parameters, g_stack_time


@dataclass(frozen=True)
class StagePlan:
    """One stage, and the structures that it passes through when decisions cost most.

    A run without ``growth.stages`` has one, whose configuration is the run's.
    """

    stage: Stage
    stretches: tuple[Stretch, ...]
    pairs: AttendedPairs | None = None
    """Of the data; None: every sequence is one document."""

    @property
    def config(self) -> Config:
        return self.stage.config

    @cached_property
    def plans(self) -> frozenset[LoopPlan]:
        return frozenset(stretch.plan for stretch in self.stretches)

    @cached_property
    def flops(self) -> int:
        """Model FLOPs of all its steps."""
        return total_flops(self.config, self.stretches, self.pairs)

    @property
    def tokens(self) -> int:
        return self.config.tokens_between(self.stage.first + 1, self.stage.last)

    def peak(self, world_size: int, precision: str) -> int:
        """Bytes on the fullest rank at the worst moment."""
        return peak_memory(self.config, self.plans, world_size, precision)


def total_flops(config: Config, stretches: Sequence[Stretch], pairs: AttendedPairs | None = None) -> int:
    """Model FLOPs of ``stretches`` of the model of ``config``."""
    return sum(flops_between(config, one.plan, one.first, one.last, pairs) for one in stretches)


def plan_stages(config: Config, pairs: AttendedPairs | None = None) -> tuple[StagePlan, ...]:
    """The stages of ``config`` on data of ``pairs``.

    Raises:
        ConfigError: they are refused, see ``stages_of``.
    """
    stages = stages_of(config)
    timelines = map(tuple, stage_timelines(stages))
    return tuple(StagePlan(stage, stretches, pairs) for stage, stretches in zip(stages, timelines, strict=True))


def largest_checkpoint(config: Config, precision: str) -> int:
    """Bytes of the largest checkpoint of the run.

    Raises:
        ConfigError: the stages are refused.
    """
    return max(checkpoint_bytes(stage.config, precision) for stage in stages_of(config))


def stage_table(
    stages: Sequence[StagePlan], world_size: int, machine: Machine, mfu: float, precision: str
) -> dict[str, Any]:
    """The numbers of a run of several stages, JSON-able."""
    rate = world_size * machine.gpu.peak(precision) * mfu
    rows = [_row(one, world_size, precision, rate) for one in stages]
    times = [boundary_time(a.stage, b.stage, world_size, machine, precision) for a, b in pairwise(stages)]
    for row, time in zip(rows[1:], times, strict=True):
        row["boundary_s"] = {**asdict(time), "total": time.total}
    last = stages[-1].config
    if [row["operator"] for row in rows[1:]] == ["g_stack"]:  # the fit is of one growth
        fit = g_stack_time(fitted_parameters(last.model), sum(one.tokens for one in stages))
        rows[1]["growth_time"] = {**asdict(fit), "clamped": fit.clamped, "configured": rows[0]["tokens"]}
    whole, scratch = sum(one.flops for one in stages), total_flops(last, timeline(last), stages[-1].pairs)
    kept = [row["checkpoint_bytes"] for row in rows[:-1]]
    return {
        "rows": rows,
        "peak": max(row["peak"] for row in rows),
        "boundaries_s": sum(time.total for time in times),
        "boundary_saves": kept,
        "on_disk": _on_disk(last, rows),
        "scratch_flops": scratch,
        "saving": scratch / whole - 1,
    }


def _row(one: StagePlan, world_size: int, precision: str, rate: float) -> dict[str, Any]:
    stage, model = one.stage, one.config.model
    cut = describe_cut(one.config, world_size)
    return {
        **({} if cut is None else {"pipeline": cut}),
        "stage": stage.index,
        "operator": None if stage.grown is None else stage.grown.settings.operator,
        "first_step": stage.first + 1,
        "last_step": stage.last,
        "tokens": one.tokens,
        "num_layers": model.num_layers,
        **{name: getattr(model, name) for name in WIDTHS},
        "parameters": parameter_count(model),
        "flops_per_token": one.flops / one.tokens,
        "flops": one.flops,
        "peak": one.peak(world_size, precision),
        "checkpoint_bytes": checkpoint_bytes(one.config, precision),
        "days": one.flops / rate / 86400,
    }


def _on_disk(config: Config, rows: Sequence[dict[str, Any]]) -> int:
    """Bytes of checkpoints at the end."""
    there = kept_steps(config, [row["last_step"] for row in rows[:-1]])
    return sum(next(row["checkpoint_bytes"] for row in rows if step <= row["last_step"]) for step in there)
