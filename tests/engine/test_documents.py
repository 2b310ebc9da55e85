"""Steps on sequences of documents: the same for every size of micro-batches, ZeRO stage and pipeline.

The loss counts few documents, unevenly over the sequences. What the others say must move nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch

from megatron_sgt.engine.build import build_runtime, start_processes
from megatron_sgt.engine.step import train_step
from megatron_sgt.evaluation.perplexity import mean_loss
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model.apply_plan import apply_plan
from tests.helpers.documents import LENGTH, VOCABULARY, observed_batch
from tests.helpers.exhaustive import exhaustive
from tests.helpers.ranks import SHARED_MEMORY, run_on_ranks
from tests.helpers.single import small_config

LOOPS = LoopPlan(4, ((1, LayerPlan(1, (0, 3))), (3, LayerPlan(2, (1, 2), 0.5))))
PARTS = ((10, 12, 10), (4, 22), (2, 12), (32,))
OBSERVED = ((0, 10, 22), (1, 4, 26), (3, 0, 32))


@dataclass(frozen=True)
class Layout:
    """``micro``: sequences of a micro-batch."""

    micro: int = 1
    tensor: int = 1
    stages: int = 1
    virtual: int = 1
    zero: int = 1
    recompute: str = "none"


ALONE = [Layout(micro=1), Layout(micro=2), Layout(micro=4)]
SHARE = {
    "data parallel": [
        Layout(zero=0),
        Layout(micro=2, zero=2, recompute="selective"),
        Layout(zero=3, recompute="full"),
    ],
    "tensor parallel": [Layout(tensor=2, zero=3)],
    "pipeline": [Layout(stages=2, recompute="full")],
    "interleaved": [Layout(stages=2, virtual=2)],
}
RECOMPUTE = ("none", "selective", "full")
MORE = {
    "data parallel": [Layout(zero=zero, recompute=how) for zero in range(4) for how in RECOMPUTE],
    "tensor parallel": [Layout(2, tensor=2, zero=zero, recompute=how) for zero in range(4) for how in RECOMPUTE],
    "pipeline": [Layout(1, stages=2, zero=zero, recompute=how) for zero in range(3) for how in RECOMPUTE],
    "interleaved": [Layout(2, stages=2, virtual=2, zero=zero, recompute=how) for zero in range(3) for how in RECOMPUTE],
}
"""One start of ranks for each: DeepSpeed keeps the groups of the first layout."""


def one_step(info: RankInfo, layout: Layout, others: int) -> dict[str, Any]:
    config = small_config(
        model={"vocab_size": VOCABULARY, "seq_length": LENGTH, "init_method_std": 0.1},
        data={"reset_attention_mask": True, "reset_position_ids": True, "eod_mask_loss": True},
        parallel={
            "tensor_model_parallel_size": layout.tensor,
            "pipeline_model_parallel_size": layout.stages,
            "virtual_pipeline_model_parallel_size": layout.virtual,
            "zero_stage": layout.zero,
        },
        deepspeed={"zero_optimization": {"stage": layout.zero}},
        train={
            "micro_batch_size": layout.micro, "global_batch_size": 4, "recompute_granularity": layout.recompute,
        },
        growth={"num_keep_heads": 2, "max_loop_depth": 2},
    )  # fmt: skip
    groups = start_processes(config, info)
    runtime = build_runtime(config, groups)
    apply_plan(runtime.model, LOOPS)
    runtime.engine.train()
    runtime.model.meter.enabled = True
    whole = observed_batch(PARTS, OBSERVED, others)
    batches = []
    for number in range(config.num_micro_batches(groups.world_size)):
        first = (number * groups.dp_size + groups.dp_rank) * layout.micro
        batches.append({name: t[first : first + layout.micro] for name, t in whole.items()})
    valid = mean_loss(runtime.engine, batches, groups)
    result = train_step(runtime.engine, batches, 1e-2, 0.0, groups)
    entropies = runtime.model.meter.reduce(groups)
    weights = {n: getattr(p, "ds_tensor", p).detach().clone() for n, p in runtime.model.named_parameters()}
    loss = result.loss.clone()
    if groups.dp_size > 1:
        torch.distributed.all_reduce(loss, group=groups.dp_group)
    return {
        "loss": float(loss) / groups.dp_size, "norm": result.grad_norm, "valid": valid,
        "entropies": torch.from_numpy(entropies), "weights": weights,
    }  # fmt: skip


def steps(info: RankInfo, layouts: list[Layout]) -> list[dict[str, Any]]:
    """Of every layout: what a step measures, and whether it is the same with other contents."""
    found = []
    for layout in layouts:
        one, other = one_step(info, layout, 1), one_step(info, layout, 2)
        weights, others = one.pop("weights"), other.pop("weights")
        one["moved"] = [name for name in weights if not torch.equal(weights[name], others[name])]
        one["moved"] += [name for name in ("loss", "norm", "valid") if one[name] != other[name]]
        found.append(one)
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """Of plain means: the sum of cross-entropies over all counted tokens, in one micro-batch."""
    found = run_on_ranks(1, steps, ALONE)[0]
    for other in found[:-1]:
        check(other, found[-1], "one rank")
    return found[-1]


def check(found: dict[str, Any], expected: dict[str, Any], where: Any) -> None:
    assert found["moved"] == [], where
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6), where
    assert found["valid"] == pytest.approx(expected["loss"], abs=1e-6), where
    assert found["norm"] == pytest.approx(expected["norm"], rel=2e-6), where
    assert float((found["entropies"] - expected["entropies"]).abs().max()) <= 1e-6, where


@pytest.mark.parametrize(
    "layouts", [*SHARE.values(), *map(exhaustive, MORE.values())], ids=[*SHARE, *(f"all {name}" for name in MORE)]
)
def test_the_same_step(layouts: list[Layout], expected: dict[str, Any]) -> None:
    backend = "gloo" if layouts[0].stages > 1 else SHARED_MEMORY
    for rank, found in enumerate(run_on_ranks(2, steps, layouts, backend=backend, timeout=600)):
        for layout, one in zip(layouts, found, strict=True):
            check(one, expected, (rank, asdict(layout)))
