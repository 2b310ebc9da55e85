"""Sums over micro-batches and ranks; nothing counts twice when activations are computed again."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.entropy_meter import EntropyMeter
from tests.helpers.fake_groups import fake_groups
from tests.helpers.single import random_batch, single_model, small_config
from tests.helpers.variants import make_weights_uneven

CPU = torch.device("cpu")
ALONE = fake_groups()


def new_meter(tp_size: int = 1, tp_rank: int = 0) -> EntropyMeter:
    meter = EntropyMeter(2, 3, HeadLayout(4, 4, 2, tp_size, tp_rank), CPU)
    meter.enabled = True
    return meter


def test_mean_over_micro_batches() -> None:
    meter = new_meter()
    for value in (0.25, 0.75):
        meter.store(0, 0, torch.full((4,), value))
        meter.store(1, 2, torch.tensor([value, 1.0]), torch.tensor([1, 3]))
        meter.end_micro_batch()
    table = meter.reduce(ALONE)
    assert table.dtype == np.float64 and table.shape == (2, 3, 4)
    wanted = np.zeros((2, 3, 4))
    wanted[0, 0] = 0.5
    wanted[1, 2] = [0.0, 0.5, 0.0, 1.0]
    assert np.array_equal(table, wanted)


def test_storing_again_replaces() -> None:
    meter = new_meter()
    for _ in range(3):
        meter.store(0, 0, torch.full((4,), 0.5))
    meter.end_micro_batch()
    assert meter.reduce(ALONE)[0, 0].tolist() == [0.5] * 4


def test_reduce_and_reset_start_fresh() -> None:
    meter = new_meter()
    for finish in (lambda: meter.reduce(ALONE), meter.reset):
        meter.store(0, 1, torch.ones(4))
        meter.end_micro_batch()
        finish()
        meter.store(1, 0, torch.full((4,), 0.5))
        meter.end_micro_batch()
        table = meter.reduce(ALONE)
        assert table[1, 0].tolist() == [0.5] * 4
        assert table[0].sum() == 0.0  # what an ended step left behind is not measured again


def test_a_disabled_meter_counts_nothing() -> None:
    meter = new_meter()
    meter.enabled = False
    meter.store(0, 0, torch.ones(4))
    meter.end_micro_batch()
    assert not meter.reduce(ALONE).any()


def test_ranks_fill_their_own_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensor-parallel times two data-parallel ranks, whose all-reduce is simulated here."""
    tables: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda table: tables.append(table.clone()))
    values = {(tp, dp): 0.1 + 0.2 * tp + 0.4 * dp for tp in range(2) for dp in range(2)}

    def reduce(tp_rank: int, dp_rank: int) -> Any:
        meter = new_meter(2, tp_rank)
        for _ in range(3):
            meter.store(1, 0, torch.full((2,), values[tp_rank, dp_rank]))
            meter.end_micro_batch()
        return meter.reduce(fake_groups(tp_rank, 2, dp_rank, 2))

    for place in values:
        reduce(*place)
    summed = sum(tables)
    monkeypatch.setattr(dist, "all_reduce", lambda table: table.copy_(summed))
    wanted = [(values[tp, 0] + values[tp, 1]) / 2 for tp in (0, 0, 1, 1)]
    for place in values:
        table = reduce(*place)
        assert table.shape == (2, 3, 4)
        assert table[1, 0] == pytest.approx(wanted, abs=1e-7)
        assert not table[0].any() and not table[1, 1:].any()


def test_sequences_that_count_are_weighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and numbers of sequences, over micro-batches and 2 x 2 x 2 ranks, whose all-reduce is simulated here."""
    tables: list[torch.Tensor] = []
    monkeypatch.setattr(dist, "all_reduce", lambda table: tables.append(table.clone()))
    counted = {0: (3, 0), 1: (1, 4)}  # by data-parallel rank: of its micro-batches

    def reduce(tp_rank: int, dp_rank: int, pp_rank: int, seen: bool = True) -> Any:
        layout = HeadLayout(4, 4, 2, 2, tp_rank)
        meter = EntropyMeter(2, 3, layout, CPU, weighted=True)
        meter.enabled = True
        for number in counted[dp_rank]:
            meter.store(pp_rank, 0, torch.full((2,), number * (0.1 + 0.5 * tp_rank)) * seen)
            meter.end_micro_batch(weight=number * seen)
        return meter.reduce(fake_groups(tp_rank, 2, dp_rank, 2, pp_rank, 2))

    places = [(tp, dp, pp) for tp in range(2) for dp in range(2) for pp in range(2)]
    for place in places:
        reduce(*place)
    summed = sum(tables)
    assert int(summed[-1]) == 4 * (3 + 0 + 1 + 4)
    monkeypatch.setattr(dist, "all_reduce", lambda table: table.copy_(summed))
    for place in places:
        table = reduce(*place)
        assert table[:, 0] == pytest.approx(np.array([[0.1, 0.1, 0.6, 0.6]] * 2), abs=1e-7)
    monkeypatch.setattr(dist, "all_reduce", lambda table: None)
    assert reduce(0, 0, 0, seen=False) is None  # a step in which no sequence counts


PLAN = LoopPlan(4, ((1, LayerPlan(2, (0, 1, 3))), (2, LayerPlan(1, (1, 2), 0.5)), (3, LayerPlan(2, (0,), 0.25))))


def step(recompute: str, groups: int) -> tuple[np.ndarray, list[torch.Tensor]]:
    config = small_config(model={"num_query_groups": groups}, train={"recompute_granularity": recompute})
    model = single_model(config).train()
    make_weights_uneven(model)
    apply_plan(model, PLAN)
    model.meter.enabled = True
    for seed in range(3):
        model(**random_batch(config, seed)).backward()
        model.meter.end_micro_batch()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return model.meter.reduce(ALONE), grads


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_count_once(recompute: str, groups: int) -> None:
    """Bit for bit: the same table, and the gates of the loops in the same gradients."""
    wanted, wanted_grads = step("none", groups)
    table, grads = step(recompute, groups)
    assert np.array_equal(table, wanted)
    assert wanted[:, 0].min() > 0.1  # every head of every layer's ordinary pass
    assert wanted[1, 1:, [0, 1, 3]].min() > 0.1 and not wanted[1, 1:, 2].any()
    assert wanted[2, 1].min() > 0.1 and not wanted[2, 2].any()
    assert wanted[3, 1:].min() > 0.1 and not wanted[0, 1:].any()
    assert len(grads) == len(wanted_grads)
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert torch.equal(grad, wanted_grad)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_validation_between_micro_batches_measures_nothing(recompute: str) -> None:
    config = small_config(train={"recompute_granularity": recompute})
    model = single_model(config).train()
    model.meter.enabled = True
    model(**random_batch(config)).backward()
    with torch.no_grad():
        model.eval()
        model(**random_batch(config, seed=5))
        model.train()
    model.meter.end_micro_batch()
    watched = model.meter.reduce(ALONE)
    model(**random_batch(config)).backward()
    model.meter.end_micro_batch()
    assert np.array_equal(watched, model.meter.reduce(ALONE))


def test_chunks_of_a_micro_batch_are_added_and_count_once() -> None:
    """Interleaved, other micro-batches pass between the chunks of one: what a chunk stored is not added again."""
    meter = new_meter()
    for value in (0.25, 0.75):
        meter.store(0, 0, torch.full((4,), value))
        meter.end_micro_batch(whole=False)
    for value in (0.5, 1.0):
        meter.store(1, 0, torch.full((4,), value))
        meter.end_micro_batch()
    table = meter.reduce(ALONE)
    assert table[0, 0].tolist() == [0.5] * 4 and table[1, 0].tolist() == [0.75] * 4


def test_a_backward_pass_stores_nothing() -> None:
    meter = new_meter()
    meter.store(0, 0, torch.full((4,), 0.5))
    meter.end_micro_batch()
    with meter.paused():
        meter.store(0, 0, torch.ones(4))
        meter.store(1, 2, torch.ones(1), torch.tensor([2]))
    meter.end_micro_batch()
    table = meter.reduce(ALONE)
    assert table.sum() == 1.0 and table[0, 0].tolist() == [0.25] * 4
