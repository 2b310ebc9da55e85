"""Fused loop passes equal the plain ones in the whole model: losses, gradients, entropies."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgt.config import Config
from megatron_sgt.engine.build import start_processes
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.model import gpt
from megatron_sgt.model.apply_plan import apply_plan, begin_step, mark_micro_batch, sgt_layers
from megatron_sgt.model.gpt import LanguageModel, build_model
from megatron_sgt.ops import fused_loop
from tests.helpers.fake_groups import fake_groups
from tests.helpers.ranks import run_on_ranks
from tests.helpers.single import random_batch, single_model, small_config
from tests.helpers.variants import ATTENTION_VARIANTS, make_weights_uneven

TOLERANCE = 2e-5
"""fp32, on gradients of order 1 to 10."""


def built(config: Config, fused: bool, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A model whose fused operations run through their definitions: this machine need not have Triton."""
    monkeypatch.setattr(gpt, "loop_backend", lambda *_: ("triton" if fused else "torch", ""))
    model = single_model(config).train()
    make_weights_uneven(model)
    assert all(layer.loop_options.fused is fused for layer in sgt_layers(model))
    return model


def count_custom_attention(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One entry per pass that goes through the project's own attention."""
    taken: list[None] = []
    attend = fused_loop.attend

    def counted(*args: Any) -> Any:
        taken.append(None)
        return attend(*args)

    monkeypatch.setattr(fused_loop, "attend", counted)
    return taken


def step(model: LanguageModel, config: Config, plan: LoopPlan) -> tuple[Tensor, dict[str, Tensor], Any]:
    apply_plan(model, plan)
    model.zero_grad()
    model.meter.enabled = True
    loss = model(**random_batch(config))
    loss.backward()
    model.meter.end_micro_batch()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, model.meter.reduce(fake_groups())


def assert_equal_steps(one: Any, other: Any) -> None:
    assert one[1].keys() == other[1].keys()
    assert abs(float(one[0] - other[0])) < 2e-6
    for name, grad in one[1].items():
        gap = float((grad - other[1][name]).abs().max()) / max(1.0, float(grad.abs().max()))
        assert gap < TOLERANCE, f"{name}: {gap}"
    assert abs(one[2] - other[2]).max() < 2e-6


@pytest.mark.parametrize("kind", ["custom", "library"])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_equals_the_plain_pass(variant: str, depth: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = count_custom_attention(monkeypatch)
    config = small_config(
        model=ATTENTION_VARIANTS[variant], growth={"max_loop_depth": depth}, train={"loop_attention": kind}
    )
    plan = LoopPlan(4, ((1, LayerPlan(depth, (0, 1, 3))), (2, LayerPlan(1, (2,), 0.5)), (3, LayerPlan(1, (0, 3)))))
    plain, fused = (step(built(config, way, monkeypatch), config, plan) for way in (False, True))
    assert_equal_steps(fused, plain)
    assert len(taken) == (depth + 1 if kind == "custom" else 0)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits with activations computed twice."""
    plan = LoopPlan(4, ((3, LayerPlan(2, (1, 2))),))
    results = []
    for granularity in ("none", recompute):
        config = small_config(train={"recompute_granularity": granularity, "loop_attention": "custom"})
        results.append(step(built(config, True, monkeypatch), config, plan))
    (loss, grads, table), (loss2, grads2, table2) = results
    assert torch.equal(loss, loss2) and (table == table2).all()
    assert all(torch.equal(grads[name], grads2[name]) for name in grads)


def _balanced(info: RankInfo, fused: bool, sequence_parallel: bool, method: str, model: dict[str, Any]) -> Any:
    gpt.loop_backend = lambda *_: ("triton" if fused else "torch", "")  # type: ignore[assignment]
    config = small_config(
        model={"num_layers": 2, "num_attention_heads": 8, **model},
        parallel={
            "tensor_model_parallel_size": info.world_size,
            "loop_method": method,
            "sequence_parallel": sequence_parallel,
        },
        growth={"max_loop_depth": 2, "exclude_layers": [], "top_k_layers": 2},
        train={"loop_attention": "custom"},
    )
    groups = start_processes(config, info)
    built = build_model(config, groups, "fp32", 3).train()
    apply_plan(built, LoopPlan(2, ((0, LayerPlan(2, (1, 2, 7))), (1, LayerPlan(1, (3,))))))
    built.meter.enabled = True
    begin_step(built)
    losses = []
    for seed in (0, 1):
        mark_micro_batch(built, last=seed == 1)
        loss = built(**random_batch(config, seed))
        loss.backward()
        built.meter.end_micro_batch()
        losses.append(float(loss))
    gradients = {name: p.grad.clone() for name, p in built.named_parameters()}
    return losses, gradients, torch.from_numpy(built.meter.reduce(groups))


def _compare(info: RankInfo) -> dict[str, float]:
    """Largest difference on this rank between fused and plain, by way of looping."""
    worst = {}
    models = {"plain": {}, "norms": {"num_query_groups": 4, "qk_layernorm": True, "add_bias_linear": True}}
    for name, model in models.items():
        for sequence_parallel in (False, True):
            for method in ("owner", "balanced"):
                one, other = (_balanced(info, way, sequence_parallel, method, model) for way in (True, False))
                gaps = [abs(a - b) for a, b in zip(one[0], other[0], strict=True)]
                gaps += [float((one[1][key] - other[1][key]).abs().max()) for key in other[1]]
                gaps.append(float((one[2] - other[2]).abs().max()))
                worst[f"{name}, {method}, sequence parallel {sequence_parallel}"] = max(gaps)
    return worst


def test_equals_the_plain_pass_on_two_ranks() -> None:
    for gaps in run_on_ranks(2, _compare):
        assert not {case: gap for case, gap in gaps.items() if not gap <= 1e-6}
