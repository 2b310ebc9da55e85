"""The one translation from this project's configuration to Megatron-Core's TransformerConfig."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_sgt.config import Config
from megatron_sgt.errors import ConfigError
from megatron_sgt.model.mlp import ffn_module
from megatron_sgt.ops.backend import runs_triton
from megatron_sgt.planning.pipeline import pipeline_layout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transformer_config(config: Config, precision: str, device: torch.device, plain: bool = False) -> TransformerConfig:
    """Translate.

    Args:
        plain: use Megatron-Core's own activation (see ``spec.decoder_spec``).
        precision: "fp32", "bf16" or "fp16", already resolved for the device.
        device: where the model will run; fused kernels and CPU initialisation depend on it.

    Raises:
        ConfigError: Megatron-Core refuses the combination; its message is passed on.
    """
    model, parallel, ffn = config.model, config.parallel, ffn_module(config.model)
    try:
        return TransformerConfig(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            normalization=model.normalization,
            layernorm_epsilon=model.layernorm_epsilon,
            gated_linear_unit=ffn.gated,
            activation_func=ffn.activation,
            add_bias_linear=model.add_bias_linear,
            add_qkv_bias=model.add_qkv_bias,
            qk_layernorm=model.qk_layernorm,
            attention_dropout=model.attention_dropout,
            hidden_dropout=model.hidden_dropout,
            init_method_std=model.init_method_std,
            # Megatron's streams make initial weights that depend on the layout: see ``initial_weights``.
            init_method=_leave,
            output_layer_init_method=_leave,
            embedding_init_method=_leave,
            use_cpu_initialization=draws_on_cpu(config, device),
            params_dtype=DTYPES[precision],
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            **_pipeline(config, precision, device),
            # Recompute is done by the layer and the core attention themselves (layer.py, core_attention.py):
            # Megatron's own would lose the gates of a loop pass, and knows no lists of layers.
            **fusions(config, precision, device, plain),
            # Megatron's fused rotary needs Transformer Engine or Apex; ``ops.rotary`` has one that does not.
            apply_rope_fusion=False,
            # Weight-gradient accumulation into main_grad bypasses autograd, on which DeepSpeed relies.
            gradient_accumulation_fusion=False,
            masked_softmax_fusion=False,
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"Megatron-Core refuses this model: {error}") from error


def _pipeline(config: Config, precision: str, device: torch.device) -> dict[str, Any]:
    """Megatron-Core's settings of a pipeline; none without one."""
    layout = pipeline_layout(config)
    if layout.size == 1:
        return {}
    # Interleaved, two messages to the same rank are under way at a time; at two stages these are also from the same
    # rank, and batched they would be taken for each other.
    interleaved = layout.virtual_size > 1
    return {
        "pipeline_model_parallel_size": layout.size,
        "virtual_pipeline_model_parallel_size": layout.virtual_size if interleaved else None,
        "pipeline_model_parallel_layout": layout.megatron(),
        "pipeline_dtype": DTYPES[precision],
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "batch_p2p_sync": device.type != "cpu",  # it waits for a GPU
        # An overlapped send still reads its output; until 0.19 Megatron-Core does not wait for it.
        "deallocate_pipeline_outputs": not interleaved,
    }


def draws_on_cpu(config: Config, device: torch.device) -> bool:
    """Whether the initial weights of a model on ``device`` are made on the CPU."""
    wanted = config.model.use_cpu_initialization
    return device.type == "cpu" if wanted is None else wanted


def _leave(weight: Tensor) -> Tensor:
    return weight


def compiles(config: Config, device: torch.device) -> bool:
    """Whether ``train.fusions`` is on for ``device``.

    Fusions go through torch.compile, which generates code when the run starts: this takes seconds on a GPU and needs a
    C++ compiler on a CPU, so "auto" means off on a CPU.
    """
    wanted = config.train.fusions
    return wanted == "on" or (wanted == "auto" and device.type != "cpu" and runs_triton(device))


def fusions(config: Config, precision: str, device: torch.device, plain: bool = False) -> dict[str, bool]:
    """Megatron-Core's switches for ``train.fusions``, and for what replaces the fusions where they are off."""
    ffn, on = ffn_module(config.model), compiles(config, device)
    # Megatron-Core's fused cross-entropy rounds the gradient of the logits to bf16 whatever their type, which only a
    # bf16 run can bear.
    return {
        "bias_activation_fusion": on and ffn.compiles(config.model.add_bias_linear),
        # Named after Transformer Engine; it means that the activation module of the spec (``mlp.py``) is used.
        "use_te_activation_func": ffn.own_activation and not on and not plain,
        "bias_dropout_fusion": on,
        "cross_entropy_loss_fusion": on and precision == "bf16",
    }
