"""Which way of looping a plan, a layout and the kernels lead to."""

from typing import Any

import pytest

from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.growth import LayerPlan
from megatron_sgt.model.balanced_loop import BalancedLoop
from megatron_sgt.model.fused_pass import FusedLoop
from megatron_sgt.model.head_loop import DenseLoop, SparseLoop
from megatron_sgt.model.loop_pass import LoopOptions, choose_loop_pass

WHOLE, SECOND = HeadLayout(8, 4, 2), HeadLayout(8, 4, 2, tp_size=2, tp_rank=1)
GROUP: Any = None
SPARSE = LayerPlan(2, (1, 4, 7))


def options(layout: HeadLayout, balanced: bool = False, sharded: bool = False) -> list[LoopOptions]:
    """Without and with fused operations."""
    return [LoopOptions(layout, balanced, sharded, fused) for fused in (False, True)]


@pytest.mark.parametrize("plan", [LayerPlan(), LayerPlan(block_loops=2)])
def test_a_layer_without_head_loops(plan: LayerPlan) -> None:
    assert choose_loop_pass(plan, options(WHOLE)[0], GROUP) is None


@pytest.mark.parametrize("fused", [0, 1])
def test_a_window_goes_through_all_heads(fused: int) -> None:
    plan = LayerPlan(2, (1, 4, 7), 0.25)
    chosen = choose_loop_pass(plan, options(SECOND, balanced=True, sharded=True)[fused], GROUP)
    assert isinstance(chosen, DenseLoop)
    assert chosen.gates.tolist() == [1.0, 0.25, 0.25, 1.0]  # heads 4 to 7


@pytest.mark.parametrize("layout", [WHOLE, SECOND])
def test_each_rank_loops_its_own(layout: HeadLayout) -> None:
    plain, fused = (choose_loop_pass(SPARSE, each, GROUP) for each in options(layout))
    assert isinstance(plain, SparseLoop) and not plain.kernels
    if layout is WHOLE:
        assert isinstance(fused, FusedLoop)
        fused = fused.kept
    assert isinstance(fused, SparseLoop) and fused.kernels
    for chosen in (plain, fused):
        assert chosen.blocks.ids.tolist() == ([1, 4, 7] if layout is WHOLE else [4, 7])


@pytest.mark.parametrize("sharded", [False, True])
def test_balanced_each_rank_loops_all(sharded: bool) -> None:
    plain, fused = (choose_loop_pass(SPARSE, each, GROUP) for each in options(SECOND, True, sharded))
    assert isinstance(plain, BalancedLoop) and not plain.kernels
    if sharded:
        assert isinstance(fused, FusedLoop)
        fused = fused.kept
    assert isinstance(fused, BalancedLoop) and fused.kernels
    for chosen in (plain, fused):
        assert chosen.blocks.whole and chosen.blocks.ids.tolist() == [1, 4, 7]
        assert chosen.sharded is sharded
        assert all(part.partial_gradients is sharded for part in chosen.weights.slices)
        assert chosen.weights.proj.own.tolist() == [0, 1, 6, 7]  # columns of heads 4 and 7
