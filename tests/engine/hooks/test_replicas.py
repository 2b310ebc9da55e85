"""Ranks that execute different structures stop; one unit in the last place of one rank's weight is seen and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_sgt.checkpoint import layout
from megatron_sgt.config.pipeline import PipelineLayout
from megatron_sgt.engine.build import start_processes
from megatron_sgt.engine.hooks.replicas import (
    CorruptionError,
    PlanMismatchError,
    ReplicaCheckHook,
    _differing,
    checksum,
    verify_loaded,
    verify_replicas,
    verify_same_plan,
)
from megatron_sgt.engine.step import StepResult, TrainState
from megatron_sgt.errors import CheckpointError
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model import apply_plan as apply_plan_module
from megatron_sgt.model.apply_plan import apply_plan, executed_plan
from megatron_sgt.model.gpt import build_model
from megatron_sgt.parallel.groups import ParallelGroups
from tests.engine.test_step import Steps
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import single_groups, single_model, small_config
from tests.helpers.two_devices import GPU, TwoDevices, device_of, on_gpu

NORM = "gpt.decoder.final_layernorm.weight"
QKV = "gpt.decoder.layers.1.self_attention.linear_qkv.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    values = torch.randn(257, dtype=torch.float64).to(dtype)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    original = int(checksum(values))
    for index in (0, 100, 256):
        for bit in range(8 * values.element_size() - 1):
            flipped = values.clone()
            flipped.view(integer)[index] ^= 1 << bit
            assert int(checksum(flipped)) != original, (index, bit)
    assert int(checksum(values.flip(0))) != original, "the order counts"


def test_chunks_do_not_change_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(1000)
    whole = int(checksum(values))
    monkeypatch.setattr("megatron_sgt.engine.hooks.replicas._CHUNK", 64)
    assert int(checksum(values)) == whole


@pytest.mark.parametrize(
    ("values", "zero", "wrong"),
    [
        ([(1, 5), (1, 6), (1, 5), (1, 6)], 1, []),
        ([(1, 5), (1, 6), (2, 5), (1, 6)], 1, [2]),  # the majority of four decides
        ([(1, 5), (1, 6), (1, 5), (1, 7)], 1, [1, 3]),  # of two copies neither
        ([(1, 5), (2, 6), (3, 7), (3, 8)], 3, [0, 1]),  # parts: compared within a tensor-parallel group only
        ([(1, 5), (2, 6), (2, 7), (2, 8)], 2, [0, 2, 1, 3]),
    ],
)
def test_who_differs(values: list[tuple[int, int]], zero: int, wrong: list[int]) -> None:
    groups = fake_groups(tp_size=2, dp_size=2)
    assert _differing(values, zero, groups) == sorted(wrong)


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ([(1, 5), (1, 6), (1, 5), (1, 6), (2, 7), (2, 8), (2, 7), (2, 8)], []),  # stages hold different weights
        ([(1, 5), (1, 6), (1, 5), (1, 6), (2, 7), (2, 8), (3, 7), (2, 8)], [6]),
        ([(1, 5), (1, 6), (1, 5), (1, 6), (2, 7), (2, 8), (2, 7), (2, 9)], [5, 7]),  # of two copies neither
    ],
)
def test_copies_lie_within_a_pipeline_stage(values: list[tuple[int, int]], wrong: list[int]) -> None:
    assert _differing(values, 1, fake_groups(tp_size=2, dp_size=2, pp_size=2)) == wrong


def change_one_weight(info: RankInfo, tensor: int, zero: int, name: str, rank: int) -> str:
    """Two steps, then one unit in the last place of one weight on ``rank``; returns the alarm's words."""
    steps = Steps(info, tensor, zero, clip=1.0)
    for step in (0, 1):
        steps.take(step)
        verify_replicas(steps.runtime.model, step, zero, steps.groups)
    if info.rank == rank:
        parameter: Any = dict(steps.runtime.model.named_parameters())[name]
        with torch.no_grad():
            flat = getattr(parameter, "ds_tensor", parameter).view(-1)
            flat[3] = torch.nextafter(flat[3], torch.tensor(torch.inf))
    try:
        verify_replicas(steps.runtime.model, 2, zero, steps.groups)
    except CorruptionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("world_size", "tensor", "zero", "name", "rank", "named"),
    [
        (4, 2, 1, NORM, 3, "rank 3 from"),  # a replicated weight on a tensor-parallel rank
        (3, 1, 2, QKV, 1, "rank 1 from"),  # a data-parallel replica
        (2, 1, 0, QKV, 1, "rank 0, 1 from"),
        (2, 2, 3, NORM, 0, "rank 0, 1 from"),
    ],
)
def test_one_unit_in_the_last_place_is_seen(
    world_size: int, tensor: int, zero: int, name: str, rank: int, named: str
) -> None:
    messages = run_on_ranks(world_size, change_one_weight, tensor, zero, name, rank)
    assert len(set(messages)) == 1, "every rank raises the same"
    assert named in messages[0] and name in messages[0] and "after step 2" in messages[0], messages[0]


class Part(torch.nn.Parameter):
    """A parameter of which this rank holds a part, as under ZeRO-3."""

    ds_tensor: torch.Tensor


@pytest.mark.parametrize("wrong", [False, True])
def test_weights_in_host_memory_are_compared_by_the_gpus(monkeypatch: pytest.MonkeyPatch, wrong: bool) -> None:
    """Parts of large weights on the host, of small ones not (``offload_param``); NCCL takes a GPU's tensors only."""
    model = torch.nn.ParameterDict({name: Part(torch.empty(0)) for name in ("host", "device")})
    model["host"].ds_tensor, model["device"].ds_tensor = torch.ones(5), on_gpu(torch.ones(3))

    def gather(outputs: list[torch.Tensor], mine: torch.Tensor) -> None:
        assert {device_of(t) for t in (*outputs, mine)} == {GPU}, "No backend type associated with device type cpu"
        for rank, output in enumerate(outputs):
            output.copy_(mine + (rank if wrong else 0))

    def gather_tables(outputs: list[Any], mine: dict[str, tuple[int, int]]) -> None:
        outputs[:] = [{name: (pair[0] + rank, 0) for name, pair in mine.items()} for rank in range(len(outputs))]

    monkeypatch.setattr("megatron_sgt.engine.hooks.replicas.dist.all_gather", gather)
    monkeypatch.setattr("megatron_sgt.engine.hooks.replicas.dist.all_gather_object", gather_tables)
    groups = replace(fake_groups(tp_size=2), device=GPU)
    with TwoDevices():
        if wrong:
            with pytest.raises(CorruptionError, match="rank 0, 1 from the others, in device, host"):
                verify_replicas(model, 1, 3, groups)
        else:
            verify_replicas(model, 1, 3, groups)


def test_when_it_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(
        "megatron_sgt.engine.hooks.replicas.verify_replicas", lambda model, step, *rest: seen.append(step)
    )
    hook = ReplicaCheckHook(torch.nn.Linear(1, 1), (4, 6, 0), 1, fake_groups())
    for step in range(1, 13):
        hook.after_step(TrainState(step=step), StepResult(torch.tensor(1.0), 1.0, step != 8, 0.1, 0.1))
    assert seen == [4, 6, 12]
    hook.after_run(TrainState(step=13))
    hook.on_stop(TrainState(step=14), 1)
    hook.on_save_now(TrainState(step=14))
    for step in (15, 16, 17):
        hook.after_step(TrainState(step=step), StepResult(torch.tensor(1.0), 1.0, step != 15, 0.1, 0.1))
    assert seen == [4, 6, 12, 13, 14, 16], "before the save that was asked for"
    nothing = ReplicaCheckHook(torch.nn.Linear(1, 1), (0, 0), 1, fake_groups())
    nothing.after_step(TrainState(step=0), StepResult(torch.tensor(1.0), 1.0, True, 0.1, 0.1))
    assert seen[-1] == 16


@pytest.mark.parametrize(
    ("equal", "latest", "said"),
    [
        (6, "global_step4", "last equal after step 6, so the last checkpoint .* is .*global_step4: start again"),
        (6, "global_step8", "is .*global_step4: write global_step4 into .*latest and start again"),
        (9, "global_step8", "last equal after step 9, so the last checkpoint .* is .*global_step8: start again"),
        (3, "global_step8", "last equal after step 3, and no checkpoint was written by then: start again from scratch"),
        (0, "global_step8", "have not been compared before in this run"),
    ],
)
def test_the_advice_is_a_checkpoint_from_before(
    equal: int, latest: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the newest one: what lies after the last comparison may hold the damage."""

    def verify(model: Any, step: int, *rest: Any) -> None:
        if step > equal:
            raise CorruptionError(f"after step {step}, weights that must be equal differ")

    monkeypatch.setattr("megatron_sgt.engine.hooks.replicas.verify_replicas", verify)
    for step in (4, 8):
        (tmp_path / f"global_step{step}").mkdir()
        (tmp_path / f"global_step{step}" / "manifest.json").touch()
    (tmp_path / "latest").write_text(latest)
    hook = ReplicaCheckHook(torch.nn.Linear(1, 1), (3,), 1, fake_groups(), tmp_path)
    hook.before_run(TrainState())
    with pytest.raises(CorruptionError, match=rf"after step {equal + 3}, .* differ\. Nothing was saved\. .*{said}"):
        for step in range(3, 15, 3):
            hook.after_step(TrainState(step=step), StepResult(torch.tensor(1.0), 1.0, True, 0.1, 0.1))


def _verify(info: RankInfo, heads: tuple[tuple[int, ...], ...]) -> str:
    config = small_config()
    groups = start_processes(config, info)
    model = build_model(config, groups, "fp32", 2)
    apply_plan(model, LoopPlan(4, ((2, LayerPlan(1, heads[info.rank])),)))
    try:
        verify_same_plan(model, LoopPlan.empty(4), groups)
    except PlanMismatchError as error:
        return str(error)
    return ""


def test_equal_plans_pass() -> None:
    assert run_on_ranks(2, _verify, ((0, 1), (0, 1))) == ["", ""]


def test_a_differing_rank_is_named_everywhere() -> None:
    messages = run_on_ranks(2, _verify, ((0, 1), (0, 2)))
    assert messages[0] == messages[1]
    for part in ("rank 1", "rank 0", "kept_heads=(0, 2)", "kept_heads=(0, 1)"):
        assert part in messages[0]


def test_the_executed_plan_is_read_from_the_layers() -> None:
    config = small_config()
    model = single_model(config)
    plan = LoopPlan(4, ((1, LayerPlan(2, (0, 3), 0.5)),))
    apply_plan(model, plan)
    assert executed_plan(model) == plan
    verify_same_plan(model, plan, single_groups(config))  # alone there is nobody to differ from


def differing_stages(info: RankInfo, slips: list[dict[int, str]]) -> list[tuple[str, ...]]:
    """PP2 x DP2: stage p holds layers 2p and 2p + 1; of each of ``slips``, by rank, the alarms."""
    whole = start_processes(small_config(), info)
    stage, replica = divmod(info.rank, 2)
    groups = replace(whole, pp_rank=stage, pp_size=2, dp_rank=replica, dp_size=2)
    decided = LoopPlan(4, ((1, LayerPlan(1, (0, 1))), (3, LayerPlan(2, (2,)))))
    said = []
    for slip in (by_rank.get(info.rank) for by_rank in slips):
        model = torch.nn.Module()
        for layer in (2 * stage, 2 * stage + 1):
            value = float(layer + (slip == "weight" and layer == 3))
            model.register_parameter(f"layer{layer}", torch.nn.Parameter(torch.full((3,), value)))
        if stage == 1:  # the stages differ in the number of their weights
            model.register_parameter("norm", torch.nn.Parameter(torch.ones(2)))
        executed = LoopPlan(4, (*decided.layers[:1], (3, LayerPlan(1, (2,))))) if slip == "plan" else decided
        engine = SimpleNamespace(module=model, zero_optimization_stage=lambda: 1)
        model.layout = PipelineLayout(2, (2, 2))  # type: ignore[assignment]
        loaded = [_alarm(verify_loaded, engine, Path("run/global_step5"), written(counts), groups) for counts in CUTS]
        said.append(
            (_alarm(verify_replicas, model, 5, 1, groups), _alarm(_same_plan, executed, decided, groups), *loaded)
        )
    return said


CUTS = ([2, 2], [1, 3])


def written(counts: list[int]) -> dict[str, Any]:
    """What a checkpoint of PP2 x DP2 says of itself."""
    sizes = {"tensor_model_parallel_size": 1, "data_parallel_size": 2, "zero_stage": 1}
    return {"layout": {**sizes, layout.PIPELINE_SIZE: 2, layout.PIPELINE_COUNTS: counts}}


def _alarm(check: Callable[..., None], *arguments: Any) -> str:
    try:
        check(*arguments)
    except (CheckpointError, CorruptionError, PlanMismatchError) as error:
        return str(error)
    return ""


def _same_plan(executed: LoopPlan, decided: LoopPlan, groups: ParallelGroups) -> None:
    own = range(2 * groups.pp_rank, 2 * groups.pp_rank + 2)
    layers = [SimpleNamespace(layer_id=n, plan=executed[n], config=SimpleNamespace(num_layers=4)) for n in own]
    with mock.patch.object(apply_plan_module, "sgt_layers", lambda model: layers):
        verify_same_plan(torch.nn.Module(), decided, groups)


def test_a_difference_on_the_second_stage_is_named_on_every_rank() -> None:
    alarms = run_on_ranks(4, differing_stages, [{}, {2: "weight", 3: "plan"}, {2: "plan", 3: "plan"}])
    assert all(said == alarms[0] for said in alarms)
    equal, (copies, plan, loaded, loaded_anew), (_, whole_stage, *_) = alarms[0]
    assert equal == ("", "", "", "")
    assert "rank 2, 3 from the others, in layer3" in copies
    assert plan.startswith("rank 3 executes another structure than rank 0: LoopPlan(") and "instead of" in plan
    assert "(3, LayerPlan(loops=1, kept_heads=(2,)" in plan and "(3, LayerPlan(loops=2, kept_heads=(2,)" in plan
    names = "mp_rank_01_model_states.pt, zero_pp_rank_0_mp_rank_01_optim_states.pt, zero_pp_rank_1_mp_rank_01_optim"
    assert f"rank 2, 3 from the others, in layer3, read from {names}" in loaded, "the files of the second stage"
    assert "read from all its files" in loaded_anew, "with other layers on the stages a rank reads of several"
    said = "rank 2 executes another structure than rank 0:"
    assert whole_stage.startswith(said), "a stage whose ranks agree is held to what was decided"


def test_the_error_is_no_usage_error() -> None:
    assert PlanMismatchError.exit_code == 1
