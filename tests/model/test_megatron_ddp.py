"""Loops under Megatron-Core's own data parallelism: gradients live in ``main_grad`` buffers, not in ``.grad``.

Megatron's hook drops the gradient that autograd brings for a parameter once ``grad_added_to_main_grad`` is set, which
the linear of the ordinary pass sets where it adds its weight gradient itself (``gradient_accumulation_fusion``). A
loop that left its part to autograd would lose it there, silently: the plain loop does, which is why this project turns
that fusion off (``mcore_config``), and the fused loop does not.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.tensor_parallel import layers
from torch import Tensor

from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model import gpt
from megatron_sgt.model.apply_plan import apply_plan
from megatron_sgt.model.gpt import LanguageModel
from tests.helpers.single import random_batch, single_model, small_config
from tests.helpers.variants import ATTENTION_VARIANTS, make_weights_uneven

PLAN = LoopPlan(4, ((1, LayerPlan(2, (0, 1, 3))), (2, LayerPlan(1, (2,), 0.5)), (3, LayerPlan(1, (0, 3)))))


def backward(model: LanguageModel, config: Any) -> None:
    """Two micro-batches."""
    apply_plan(model, PLAN)
    for seed in (0, 1):
        model(**random_batch(config, seed)).backward()


def add_weight_gradient(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """As Apex's kernel, which exists only for GPUs."""
    main_grad.addmm_(grad_output.t(), total_input)


@pytest.mark.parametrize("fusion", [False, True], ids=["autograd", "accumulation fusion"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain loop", "fused loop"])
@pytest.mark.parametrize("variant", ATTENTION_VARIANTS)
def test_main_grad_gets_every_pass(variant: str, fused: bool, fusion: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "loop_backend", lambda *_: ("triton" if fused else "torch", ""))
    # Megatron-Core allocates the buffers on the current GPU.
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=add_weight_gradient)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    config = small_config(model=ATTENTION_VARIANTS[variant], growth={"max_loop_depth": 2})
    plain, buffered = (single_model(config).train() for _ in range(2))
    for model in (plain, buffered):
        make_weights_uneven(model)
    backward(plain, config)
    wrapped = DistributedDataParallel(
        buffered.gpt.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), buffered.gpt
    )
    for module in buffered.modules():
        if fusion and hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True
    wrapped.zero_grad_buffer()
    backward(buffered, config)
    added = [p.grad_added_to_main_grad for p in buffered.parameters()]
    assert any(added) is fusion
    gaps = {}
    for (name, p), q in zip(plain.named_parameters(), buffered.parameters(), strict=True):
        assert q.grad is None and p.grad is not None, name
        gap = float((q.main_grad - p.grad).abs().max()) / max(1.0, float(p.grad.abs().max()))
        if gap > 1e-6:
            gaps[name] = gap
    lost = fusion and not fused
    looped = {
        f"gpt.decoder.layers.{layer}.self_attention.linear_{part}.weight"
        for layer in (1, 3)  # the window of layer 2 goes through Megatron's own linears
        for part in ("qkv", "proj")
    }
    assert gaps.keys() == (looped if lost else set()), gaps
