"""The translation to Megatron-Core's configuration, field by field."""

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError
from megatron_sgt.growth import LayerPlan, LoopPlan
from megatron_sgt.model import mcore_config
from megatron_sgt.model.apply_plan import apply_plan, sgt_layers
from megatron_sgt.model.gpt import build_model
from megatron_sgt.model.mcore_config import transformer_config
from tests.helpers.single import random_batch, single_groups, small_config

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("sections", "translated"),
    [
        (
            {},
            {
                "num_layers": 4,
                "hidden_size": 64,
                "ffn_hidden_size": 96,
                "num_attention_heads": 4,
                "num_query_groups": 4,
                "kv_channels": 16,
                "normalization": "RMSNorm",
                "layernorm_epsilon": 1e-6,
                "gated_linear_unit": True,
                "activation_func": F.silu,
                "add_bias_linear": False,
                "add_qkv_bias": False,
                "qk_layernorm": False,
                "attention_dropout": 0.0,
                "hidden_dropout": 0.0,
                "init_method_std": 0.02,
                "tensor_model_parallel_size": 1,
                "sequence_parallel": False,
                "recompute_granularity": None,
            },
        ),
        ({"model": {"num_query_groups": 2, "kv_channels": 24}}, {"num_query_groups": 2, "kv_channels": 24}),
        ({"model": {"activation": "gelu"}}, {"gated_linear_unit": False, "activation_func": F.gelu}),
        (
            {"model": {"normalization": "LayerNorm", "layernorm_epsilon": 1e-5, "qk_layernorm": True}},
            {"normalization": "LayerNorm", "layernorm_epsilon": 1e-5, "qk_layernorm": True},
        ),
        (
            {"model": {"add_bias_linear": True, "attention_dropout": 0.1, "hidden_dropout": 0.2}},
            {"add_bias_linear": True, "attention_dropout": 0.1, "hidden_dropout": 0.2},
        ),
        (
            {"model": {"add_qkv_bias": True, "init_method_std": 0.01}},
            {"add_qkv_bias": True, "init_method_std": 0.01},
        ),
        (
            {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "device": "cpu"}},
            {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        ),
        # Layers and attention cores recompute themselves.
        ({"train": {"recompute_granularity": "selective"}}, {"recompute_granularity": None}),
        ({"train": {"recompute_granularity": "full"}}, {"recompute_granularity": None}),
    ],
)
def test_fields(sections: dict[str, Any], translated: dict[str, Any]) -> None:
    found = transformer_config(small_config(**sections), "fp32", CPU)
    assert {name: getattr(found, name) for name in translated} == translated


@pytest.mark.parametrize(
    ("precision", "dtype", "bf16", "fp16"),
    [
        ("fp32", torch.float32, False, False),
        ("bf16", torch.bfloat16, True, False),
        ("fp16", torch.float16, False, True),
    ],
)
def test_precision(precision: str, dtype: torch.dtype, bf16: bool, fp16: bool) -> None:
    found = transformer_config(small_config(), precision, CPU)
    assert (found.params_dtype, found.bf16, found.fp16) == (dtype, bf16, fp16)


@pytest.mark.parametrize(
    ("wanted", "device", "on_cpu"),
    [(None, CPU, True), (None, GPU, False), (True, GPU, True), (True, CPU, True), (False, GPU, False)],
)
def test_where_weights_are_drawn(wanted: bool | None, device: torch.device, on_cpu: bool) -> None:
    config = small_config(model={"use_cpu_initialization": wanted})
    assert transformer_config(config, "fp32", device).use_cpu_initialization is on_cpu


def test_no_fusion_that_compiles_or_bypasses_autograd() -> None:
    for device in (CPU, GPU):
        found = transformer_config(small_config(train={"fusions": "off"}), "bf16", device)
        fusions = ("bias_dropout", "bias_activation", "apply_rope", "gradient_accumulation", "masked_softmax")
        assert not [name for name in fusions if getattr(found, f"{name}_fusion")]


def test_megatrons_refusal_is_a_configuration_error() -> None:
    """The configuration has its own check; this one is for what only Megatron-Core knows."""
    config = small_config()
    unchecked = Config.model_construct(
        **{**dict(config), "model": config.model.model_copy(update={"num_attention_heads": 6})},
    )
    unchecked = unchecked.model_copy(
        update={"parallel": config.parallel.model_copy(update={"tensor_model_parallel_size": 4})}
    )
    with pytest.raises(ConfigError, match=r"Megatron-Core refuses this model: .*6.*4"):
        transformer_config(unchecked, "fp32", CPU)


@pytest.mark.parametrize(
    ("model", "device", "wanted", "on", "activation"),
    [
        ({}, CPU, "auto", False, False),
        ({}, GPU, "auto", True, True),
        ({}, GPU, "off", False, False),
        ({}, CPU, "on", True, True),
        ({"activation": "gelu"}, GPU, "auto", True, False),
        ({"activation": "gelu", "add_bias_linear": True}, GPU, "auto", True, True),
    ],
)
def test_fusions(
    model: dict[str, Any],
    device: torch.device,
    wanted: str,
    on: bool,
    activation: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mcore_config, "runs_triton", lambda device: device.type == "cuda")
    config = small_config(model=model, train={"fusions": wanted})
    translated = transformer_config(config, "bf16", device)
    assert translated.bias_dropout_fusion is translated.cross_entropy_loss_fusion is on
    assert not transformer_config(config, "fp32", device).cross_entropy_loss_fusion
    assert translated.bias_activation_fusion is activation and not translated.apply_rope_fusion


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_model_with_compiled_functions() -> None:
    """Really compiled, recomputed in the backward pass, and called with other lengths afterwards."""
    plan = LoopPlan(4, ((2, LayerPlan(1, (2,), 0.5)), (3, LayerPlan(1, (0, 1)))))
    results = []
    for wanted in ("off", "on"):
        config = small_config(train={"fusions": wanted, "recompute_granularity": "full"})
        model = build_model(config, single_groups(config), "fp32", 3).train()
        apply_plan(model, plan)
        batch = random_batch(config)
        model(**batch).backward()
        logits = [model.logits(batch["tokens"][:, :length]) for length in (7, 12)]
        results.append(([p.grad for p in model.parameters()], logits))
    for one, other in zip(*results, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a is not None and b is not None
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_fused_functions_compute_the_same(precision: str, tolerance: float, recompute: str) -> None:
    """Fused functions, run without being compiled, against Megatron-Core's plain ones: loss and gradients."""
    plan = LoopPlan(4, ((2, LayerPlan(2, (2,), 0.5)), (3, LayerPlan(1, (0, 1)))))
    results = []
    for wanted in ("off", "on"):
        config = small_config(train={"fusions": wanted, "recompute_granularity": recompute})
        model = build_model(config, single_groups(config), precision, 3).train()
        assert all(layer.self_attention.core_attention.fused_rotary is (wanted == "on") for layer in sgt_layers(model))
        apply_plan(model, plan)
        with torch.compiler.set_stance("force_eager"):
            loss = model(**random_batch(config))
            loss.backward()
        results.append((loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, grads), (fused_loss, fused_grads) = results
    assert abs(float(fused_loss - loss)) < tolerance * float(loss)
    for name, grad in grads.items():
        gap = float((fused_grads[name] - grad).float().norm() / grad.float().norm())
        assert gap < 3 * tolerance, f"{name}: {gap}"


@pytest.mark.parametrize(
    ("device", "virtual", "wanted"),
    [
        (CPU, 1, {"batch_p2p_comm": True, "batch_p2p_sync": False, "deallocate_pipeline_outputs": True}),
        (CPU, 2, {"batch_p2p_comm": False, "batch_p2p_sync": False, "deallocate_pipeline_outputs": False}),
        (GPU, 1, {"batch_p2p_comm": True, "batch_p2p_sync": True, "deallocate_pipeline_outputs": True}),
        (GPU, 2, {"batch_p2p_comm": False, "batch_p2p_sync": True, "deallocate_pipeline_outputs": False}),
    ],
    ids=str,
)
def test_messages_of_a_pipeline(
    device: torch.device, virtual: int, wanted: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batched, or where two are under way overlapped, whose outputs stay; a GPU waits for batched ones."""
    monkeypatch.setattr(mcore_config, "compiles", lambda *_: False)
    parallel = {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": virtual}
    train = {"micro_batch_size": 1, "global_batch_size": 4}
    made = transformer_config(small_config(parallel=parallel, train=train), "bf16", device)
    assert {name: getattr(made, name) for name in wanted} == wanted
    assert made.overlap_p2p_comm == (virtual == 2) and made.pipeline_dtype == torch.bfloat16
    assert made.virtual_pipeline_model_parallel_size == (2 if virtual == 2 else None)
