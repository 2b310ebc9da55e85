"""Nothing in forward and backward asks the device for a value, which would make the CPU wait for a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model.apply_plan import apply_plan
from tests.helpers.host_syncs import HostSyncs
from tests.helpers.single import random_batch, single_model, small_config


@pytest.mark.parametrize(
    "layer",
    [LayerPlan(), LayerPlan(1, (0, 3), 0.5), LayerPlan(2, (0, 3)), LayerPlan(block_loops=1)],
    ids=["vanilla", "window", "fixed", "block loop"],
)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
def test_a_step_that_measures_entropies_waits_for_nothing(layer: LayerPlan, recompute: str, documents: bool) -> None:
    """Where documents lie is known on the host before anything is on the device."""
    told = {"reset_attention_mask": documents, "reset_position_ids": documents}
    config = small_config(train={"recompute_granularity": recompute}, data=told)
    model = single_model(config).train()
    model.meter.enabled = True
    apply_plan(model, LoopPlan(config.model.num_layers, ((2, layer),)))
    batch = random_batch(config)
    if documents:
        place = torch.arange(32, dtype=torch.int32).expand(2, -1)
        batch |= {"document_starts": place // 10 * 10, "num_tokens": torch.tensor([32, 27])}
    inputs = model.inputs(batch, torch.device("cpu"))
    with HostSyncs() as syncs:
        model(**inputs).backward()
    assert syncs.seen == []


def test_a_wait_is_seen() -> None:
    with HostSyncs() as syncs:
        float(torch.ones(1)[torch.ones(1, dtype=torch.bool)])
    assert len(syncs.seen) == 2
