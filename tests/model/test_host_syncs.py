"""Nothing in forward and backward asks the device for a value, which would make the CPU wait for a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.apply_plan import apply_plan
from tests.helpers.single import random_batch, single_model, small_config

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select}
"""Operators whose result, or its shape, the host has to know."""


class HostSyncs(TorchDispatchMode):
    """Names of the operators in WAITING that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A mask's true places have to be counted to read them, or to write several values; one value just fills.
        by_mask = function.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        by_mask = by_mask and (len(args) < 3 or args[2].numel() > 1)
        if function.overloadpacket in WAITING or by_mask:
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "layer",
    [LayerPlan(), LayerPlan(1, (0, 3), 0.5), LayerPlan(2, (0, 3)), LayerPlan(block_loops=1)],
    ids=["vanilla", "window", "fixed", "block loop"],
)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_step_that_measures_entropies_waits_for_nothing(layer: LayerPlan, recompute: str) -> None:
    config = small_config(train={"recompute_granularity": recompute})
    model = single_model(config).train()
    model.meter.enabled = True
    apply_plan(model, LoopPlan(config.model.num_layers, ((2, layer),)))
    batch = random_batch(config)
    with HostSyncs() as syncs:
        model(**batch).backward()
    assert syncs.seen == []


def test_a_wait_is_seen() -> None:
    with HostSyncs() as syncs:
        float(torch.ones(1)[torch.ones(1, dtype=torch.bool)])
    assert len(syncs.seen) == 2
