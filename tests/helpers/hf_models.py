"""Small models of the exported architecture, and the reference's answer for the same weights.

Imports neither Megatron-Core nor DeepSpeed, so that the tests that use it run in an environment with another
transformers as well.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from megatron_sgt.export.hf.configuration_sgt import SGTConfig
from megatron_sgt.export.hf.modeling_sgt import SGTForCausalLM
from tests.helpers.reference_sgt import forward

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
LOOPS = {"2": {"heads": [1, 3], "depth": 1}}
VARIANTS: dict[str, dict[str, Any]] = {
    "multi_head": {"sgt_loops": LOOPS},
    "grouped_qk_norm_depth_3": {
        "num_key_value_heads": 2, "qk_norm": True,
        "sgt_loops": {"3": {"heads": [0, 3], "depth": 3}, "1": {"heads": [0, 1, 2], "depth": 1}},
    },
    "multi_query_tied_biases_depth_2": {
        "num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True, "attention_out_bias": True,
        "mlp_bias": True, "sgt_loops": {"3": {"heads": [2], "depth": 2}},
    },
    "wide_heads_all_loop": {"head_dim": 20, "sgt_loops": {"0": {"heads": [0, 1, 2, 3], "depth": 1}}},
    "window": {"num_key_value_heads": 2, "sgt_loops": {"2": {"heads": [1, 3], "depth": 2, "other_gate": 0.35}}},
    "block_loop": {"sgt_loops": {"1": {"block_loops": 2}, "2": {"block_loops": 1}}},
    "olmo2_depth_2": {
        "num_key_value_heads": 2, "norm_position": "output", "qk_norm": True, "qk_norm_over": "all",
        "sgt_loops": {"3": {"heads": [0, 3], "depth": 2}, "1": {"heads": [1], "depth": 1}},
    },
    "never_grown": {},
}  # fmt: skip


def hf_config(variant: str = "multi_head", **changes: Any) -> SGTConfig:
    """The configuration of one of VARIANTS."""
    return SGTConfig(**{**SHAPE, **VARIANTS[variant], **changes})


def hf_model(variant: str = "multi_head", seed: int = 0, **changes: Any) -> SGTForCausalLM:
    """A model with weights large enough that every head and loop matters, in evaluation mode."""
    model = SGTForCausalLM(hf_config(variant, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 0.0 if parameter.dim() > 1 or name.endswith("bias") else 1.0
            parameter.copy_(centre + (0.25 if parameter.dim() > 1 else 0.2) * noise)
    return model


def reference_logits(model: SGTForCausalLM, tokens: Tensor) -> Tensor:
    """[B, S, vocabulary], by the independent reference; differentiable."""
    config = model.config
    gates = torch.ones(config.num_hidden_layers, config.num_attention_heads)
    depth, blocks = [0] * config.num_hidden_layers, {}
    for layer in range(config.num_hidden_layers):
        loop = config.loop_of(layer)
        depth[layer], blocks[layer] = loop["depth"], loop["block_loops"]
        if loop["depth"]:
            gates[layer] = loop["other_gate"]
            gates[layer, loop["heads"]] = 1.0
    settings = {
        "num_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
    }
    if config.rope_parameters["rope_type"] != "default":
        settings["rotary_scaling"] = {"type": config.rope_parameters["rope_type"], **config.rope_parameters}
    params = dict(model.named_parameters())  # a tied output is listed once
    return forward(params, tokens, settings, depth, gates, blocks)[0]


def random_ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, SHAPE["vocab_size"], shape, generator=generator)


def gap(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference."""
    return float((one - other).detach().abs().max())


_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")


def as_llama(model: Any, name: str = "LlamaForCausalLM") -> Any:
    """transformers' own class ``name`` with the shape and the weights of ``model``, which must not loop."""
    config = model.config
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "rms_norm_eps", "num_labels", *_SPECIAL)  # fmt: skip
    llama = getattr(transformers, name)(transformers.LlamaConfig(**{key: getattr(config, key) for key in shared}))
    # Its head for answers in the text calls the decoder by another name.
    inner = "transformer." if name == "LlamaForQuestionAnswering" else "model."
    weights = {key.replace("model.", inner, 1): tensor for key, tensor in model.state_dict().items()}
    llama.load_state_dict(weights)
    return llama.train(model.training)


class _Gated(nn.Module):
    """An output projection, whose input counts as much as the heads' gates say."""

    def __init__(self, linear: nn.Module, gates: Tensor, size: int) -> None:
        super().__init__()
        self.linear, self.gates = linear, gates.repeat_interleave(size)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, heads · size]."""
        return self.linear(x * self.gates)


class _Silent(nn.Module):
    """A feed-forward part that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)


def unrolled_llama(model: Any) -> Any:
    """Llama with a layer for every attention pass of ``model``: the same function, in transformers' own code.

    Every layer has the modules of ``model`` themselves, whatever a tool has made of them.
    """
    config = model.config
    passes = [
        (layer, gates, position == config.loop_of(n)["depth"])
        for n, layer in enumerate(model.model.layers)
        for _ in range(1 + config.loop_of(n)["block_loops"])
        for position, gates in enumerate(_gates_of_passes(config, n))
    ]
    shared = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
              "head_dim", "rms_norm_eps", *_SPECIAL)  # fmt: skip
    values = {key: getattr(config, key) for key in shared}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=len(passes), **values))
    for copy, (layer, gates, ends) in zip(llama.model.layers, passes, strict=True):
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(copy.self_attn, name, getattr(layer.self_attn, name))
        o_proj = layer.self_attn.o_proj
        copy.self_attn.o_proj = o_proj if gates is None else _Gated(o_proj, gates, config.head_dim)
        copy.input_layernorm, copy.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        copy.mlp = layer.mlp if ends else _Silent()
    llama.model.embed_tokens, llama.model.norm, llama.lm_head = (
        model.model.embed_tokens,
        model.model.norm,
        model.lm_head,
    )
    return llama.train(model.training)


def _gates_of_passes(config: SGTConfig, layer: int) -> list[Tensor | None]:
    loop = config.loop_of(layer)
    gates = torch.full((config.num_attention_heads,), float(loop["other_gate"]))
    gates[loop["heads"]] = 1.0
    return [None, *[gates] * loop["depth"]]
