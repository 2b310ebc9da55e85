"""What the mini trajectories would not forgive: each trap of a pipeline, set on purpose, must be seen by them.

And the schedules from outside: 1F1B by hand, micro-batches in flight, one value that is not finite on one stage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor
from trajectory_parts import run as rp

from megatron_sgt.compat.mpu import DeepSpeedMPU
from megatron_sgt.engine import build, pipeline, step
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model import gpt
from megatron_sgt.model.entropy_meter import EntropyMeter
from megatron_sgt.parallel.groups import ParallelGroups
from tests.helpers import one_forward_one_backward
from tests.helpers.exhaustive import share_of
from tests.helpers.pipelines import Case, beyond, check_same, gaps, repeat_on, run_case, write_mini


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """By variant: its file, and (tensors, metadata) of the reference."""
    folder = tmp_path_factory.mktemp("controls")
    return {name: (folder / name, write_mini(folder / name, name)) for name in ("sgt", "tied")}


def raw_backward() -> None:
    """As a schedule would by itself: DeepSpeed's hooks then divide by the accumulation."""
    DeepSpeedEngine.backward = lambda self, scalar, **_: scalar.backward()  # type: ignore[method-assign]


def divided_gradient() -> None:
    backward = DeepSpeedEngine.backward
    DeepSpeedEngine.backward = lambda self, scalar, **_: backward(self, scalar)  # type: ignore[method-assign]


def batched_messages() -> None:
    original = gpt.transformer_config

    def batched(*args: Any) -> Any:
        config = original(*args)
        config.overlap_p2p_comm, config.batch_p2p_comm = False, True
        return config

    gpt.transformer_config = batched


def norm_of_a_stage() -> None:
    DeepSpeedMPU.get_model_parallel_group = DeepSpeedMPU.get_tensor_model_parallel_group  # type: ignore[method-assign]


class CopiedWeight:
    """Embedding and output layer with a weight each, whose gradients are summed after the last backward pass."""

    def __init__(self, chunks: Any, groups: ParallelGroups) -> None:
        first, last = groups.is_first_stage, groups.is_last_stage
        self.weight = chunks[0].embedding.word_embeddings.weight if first else chunks[-1].output_layer.weight
        self.groups = groups
        assert first != last and groups.pp_size == 2

    def lend(self) -> None:
        pass

    def expect_gradient(self, expected: bool) -> None:
        pass

    def give_back(self) -> None:
        gradient = self.weight.grad if self.weight.grad is not None else torch.zeros_like(self.weight)
        dist.all_reduce(gradient, group=self.groups.pp_group)


def copied_weight() -> None:
    draw, start = gpt.draw_weights, build._start_engine

    def drawn(model: Any, config: Any, groups: ParallelGroups) -> None:
        """Every parameter of a stage has its place in the table of weights: the copy has none."""
        own = {} if groups.is_first_stage else model.output_layer._parameters
        copy = own.pop("weight", None)
        draw(model, config, groups)
        if copy is not None:
            own["weight"] = copy

    def started(config: Any, groups: ParallelGroups, model: Any, precision: str) -> Any:
        """The copy begins as the weight."""
        dist.broadcast(model.pipeline.tied.weight.detach(), groups.rank_at(0, 0, 0), group=groups.pp_group)
        return start(config, groups, model, precision)

    gpt.TiedWeight = CopiedWeight  # type: ignore[assignment,misc]
    gpt.draw_weights, build._start_engine = drawn, started


def counted_again() -> None:
    EntropyMeter.paused = lambda self: contextlib.nullcontext()  # type: ignore[assignment,method-assign]


def broken(info: RankInfo, path: Path, case: Case, faults: tuple[Callable[[], None], ...]) -> Any:
    """The trajectory with something broken first."""
    for fault in faults:
        fault()
    return repeat_on(info, path, case)


FAULTS: list[tuple[Callable[[], None], Case, str, float]] = [
    (raw_backward, Case(), "grad_norm", 1e-2),
    (divided_gradient, Case(), "grad_norm", 1e-2),
    (batched_messages, Case(vp=2), "grad_norm", 1e-2),
    (norm_of_a_stage, Case(), "grad_norm", 1e-2),
    (copied_weight, Case(zero=2, variant="tied"), "loss", 1e-4),
    (counted_again, Case(vp=2, recompute="full"), "ema_entropy", 1e-2),
]


@pytest.mark.parametrize(("fault", "case", "quantity", "at_least"), share_of(FAULTS, FAULTS[1:]))
def test_what_would_go_wrong_is_seen(
    fault: Callable[[], None], case: Case, quantity: str, at_least: float, files: Any
) -> None:
    """Without the fault the layout is exact (test_pipeline_mini.py); with it a number is far off, not a rank dead."""
    path, (wanted, _) = files[case.variant]
    by_rank = run_case(path, case, broken, (fault,))
    seen = max(gaps(found, wanted)[quantity] for found, _ in by_rank)
    assert seen > at_least, f"{fault.__name__}: {quantity} differs by {seen:.1e} only"


def by_hand(info: RankInfo, path: Path, case: Case) -> Any:
    calls = []

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return one_forward_one_backward.forward_backward(*args)

    step.forward_backward = counted
    result = repeat_on(info, path, case)
    assert len(calls) == 16
    return result


HAND = [
    Case(pp=4, micro_batches=8), Case(pp=4, micro_batches=2), Case(tp=2, sequence=True), Case(dp=2, zero=2),
    Case(zero=0), Case(recompute="full"), Case(pp=4, layout="1,3,3,1"),
]  # fmt: skip


@pytest.mark.parametrize("case", share_of(HAND, [HAND[0]]), ids=str)
def test_1f1b_by_hand_is_the_same(case: Case, files: Any) -> None:
    """Bit for bit: the same passes of the same chunks, with other messages and another way into the backward pass."""
    path, (wanted, meta) = files[case.variant]
    hand, product = run_case(path, case, by_hand), run_case(path, case)
    assert beyond(check_same(hand, wanted, meta)) == {}
    measured = gaps(product[0][0], hand[0][0])
    print({name: f"{gap:.1e}" for name, gap in measured.items()})
    assert max(measured.values()) <= 1e-6


def in_flight(info: RankInfo, path: Path, case: Case) -> tuple[int, int]:
    """(stage, most micro-batches of its chunks that waited for their backward pass at a time) over one step."""
    waiting, most, stage = 0, 0, -1
    build = rp.build_runtime

    def finished(_: Tensor) -> None:
        nonlocal waiting
        waiting -= 1

    def started(_: Any, __: Any, output: Tensor) -> None:
        nonlocal waiting, most
        if torch.is_grad_enabled():
            waiting += 1
            most = max(most, waiting)
            output.register_hook(finished)

    def watched(*args: Any, **options: Any) -> Any:
        nonlocal stage
        runtime = build(*args, **options)
        stage = runtime.groups.pp_rank
        for chunk in runtime.model.chunks:
            chunk.register_forward_hook(started)
        return runtime

    rp.build_runtime = watched
    repeat_on(info, path, case, train_iters=1)
    assert waiting == 0
    return stage, most


FLIGHT = [
    Case(pp=4, micro_batches=8), Case(pp=4, micro_batches=2), Case(vp=2), Case(pp=4, vp=2, micro_batches=8),
    Case(pp=4, vp=2, micro_batches=4), Case(micro_batches=8), Case(vp=2, micro_batches=2),
]  # fmt: skip


@pytest.mark.parametrize("case", share_of(FLIGHT, FLIGHT[1:4:2]), ids=str)
def test_micro_batches_in_flight(case: Case, files: Any) -> None:
    """What the formulas of the memory say: 1F1B min(M, P - p), interleaved 2(P - p - 1) + (V - 1)P + 1 chunks."""
    path, _ = files["sgt"]
    for stage, most in run_case(path, case, in_flight):
        after = case.pp - stage - 1
        interleaved = 2 * after + (case.vp - 1) * case.pp + 1
        wanted = interleaved if case.vp > 1 else after + 1
        assert most == min(wanted, case.micro_batches * case.vp), f"stage {stage}"


def poisoned(info: RankInfo, path: Path, case: Case, layer: int, guarded: bool) -> Any:
    """Three steps; in the second one an entropy of ``layer`` is NaN, on the rank that has it."""
    store, stored = EntropyMeter.store, 0

    def storing(self: EntropyMeter, number: int, attention_pass: int, entropy: Tensor, *rest: Any) -> None:
        nonlocal stored
        if number == layer and not self._paused:
            stored += 1
            if stored == case.micro_batches + 1:
                entropy = torch.full_like(entropy, torch.nan)
        store(self, number, attention_pass, entropy, *rest)

    EntropyMeter.store = storing  # type: ignore[method-assign]
    if not guarded:
        pipeline.guard = lambda *_: None
    found, _ = repeat_on(info, path, case, train_iters=3)
    return found["grad_norm"].isfinite().tolist(), found["loss"].tolist()


POISON = [(Case(pp=4, zero=zero), layer) for zero in (0, 1, 2) for layer in (1, 4, 7)]
POISON += [(Case(vp=2), layer) for layer in (0, 3, 5)] + [(Case(tp=2, sequence=True), 3)]


@pytest.mark.parametrize(("case", "layer"), share_of(POISON, [POISON[4]]), ids=str)
def test_an_entropy_that_is_not_finite_skips_the_step_on_all(case: Case, layer: int, files: Any) -> None:
    path, (wanted, _) = files["sgt"]
    for finite, losses in run_case(path, case, poisoned, layer, True):
        assert finite == [True, False, True, True], "the second step is skipped, and three are applied"
        assert losses[:2] == pytest.approx(wanted["loss"][:2].tolist(), abs=1e-6)
        assert losses[2] != pytest.approx(wanted["loss"][2].item(), abs=1e-6), "the skipped step changed the weights"


def test_without_its_guard_it_would_not(files: Any) -> None:
    path, _ = files["sgt"]
    for finite, _ in run_case(path, POISON[4][0], poisoned, POISON[4][1], False):
        assert finite == [True, True, True]
