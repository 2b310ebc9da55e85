"""Seconds between two stages: the sums of the formula, and what makes them longer. Measured nowhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sgt.planning.boundary import DRAWN, HOST, START, boundary_time
from megatron_sgt.planning.parameters import parameter_count, stage_parameter_count
from megatron_sgt.stages.stages import Stage, stages_of
from tests.planning.test_stages import FFN, G_STACK, MACHINE, MIDAS, example


def seven(layers: int, ffn: int, stage: dict[str, Any], zero: int = 1) -> tuple[Stage, Stage]:
    before, after = stages_of(example(layers, ffn, {"until_steps": 2500, **stage}))
    parallel = before.config.parallel.model_copy(update={"zero_stage": zero})
    before, after = (replace(s, config=s.config.model_copy(update={"parallel": parallel})) for s in (before, after))
    return before, after


@pytest.mark.parametrize(
    ("zero", "on_node", "made"),
    [(1, 4 / 16, 1 / 16), (2, 4 / 16, 1 / 16), (3, 1.0, 1.0)],
)
def test_a_midas_boundary_of_7b_by_hand(zero: int, on_node: float, made: float) -> None:
    """32 ranks on 4 nodes, tensor parallel 2: 16 replicas, 4 on a node; copies keep both moments, none is drawn."""
    before, after = seven(28, 11008, MIDAS, zero)
    n, m = parameter_count(before.config.model), parameter_count(after.config.model)
    time = boundary_time(before, after, 32, MACHINE, "bf16")
    assert time.save == pytest.approx(14 * n / (4 * 2e9) + 14 * n / 32 / HOST)
    assert time.rebuild == pytest.approx(START + 4 * m / 3.35e12)
    assert time.read == pytest.approx(12 * (min(n, m * on_node) / 2e9 + m * made / HOST))
    assert time.total == time.save + time.rebuild + time.read


def test_g_stack_reads_weights_alone_and_new_units_are_drawn() -> None:
    before, after = seven(8, 11008, G_STACK)
    n, m = parameter_count(before.config.model), parameter_count(after.config.model)
    assert boundary_time(before, after, 32, MACHINE, "bf16").read == pytest.approx(
        4 * (m / 4 / 2e9 + m / 16 / HOST)
    )  # a quarter of m is less than n
    assert m / 4 < n
    before, after = seven(32, 8192, FFN)
    m = parameter_count(after.config.model)
    gate_and_up = 32 * 2 * 11008 * 4096  # read new dimensions; down is zero there
    read = 12 * (m / 4 / 2e9 + m / 16 / HOST) + gate_and_up / 16 / DRAWN
    assert boundary_time(before, after, 32, MACHINE, "bf16").read == pytest.approx(read)


def test_faster_storage_shortens_saving_and_reading_alone() -> None:
    before, after = seven(28, 11008, MIDAS)
    slow, fast = (
        boundary_time(before, after, 32, machine, "bf16") for machine in (MACHINE, replace(MACHINE, storage=2e10))
    )
    assert fast.save < slow.save and fast.read < slow.read and fast.rebuild == slow.rebuild


def test_a_pipeline_shares_out_what_a_rank_reads_and_draws() -> None:
    """Two stages of 8 replicas: a node has four shards of one of them; four stages of one replica: of all."""
    before, after = seven(28, 11008, MIDAS, zero=1)

    def piped(stage: Stage, stages: int, tensor: int) -> Stage:
        sizes = {"pipeline_model_parallel_size": stages, "tensor_model_parallel_size": tensor}
        return replace(
            stage, config=stage.config.model_copy(update={"parallel": stage.config.parallel.model_copy(update=sizes)})
        )

    m, n = (parameter_count(stage.config.model) for stage in (after, before))
    half, quarter = (
        max(stage_parameter_count(piped(after, stages, 2).config, p) for p in range(stages)) for stages in (2, 4)
    )
    assert m / 2 < half < 0.52 * m
    two = boundary_time(piped(before, 2, 2), piped(after, 2, 2), 32, MACHINE, "bf16")
    assert two.read == pytest.approx(12 * (half / 8 * 4 / 2e9 + half / 8 / HOST))
    assert two.rebuild == pytest.approx(START + 4 * half / 3.35e12)
    one_replica = boundary_time(piped(before, 4, 2), piped(after, 4, 2), 8, MACHINE, "bf16")
    assert one_replica.read == pytest.approx(12 * (min(n, 4 * quarter) / 2e9 + quarter / HOST))
