"""The ModuleSpec of the decoder: Megatron-Core's parallel linears, this project's norms, attention and layer."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn import Identity

from megatron_sgt.arch.attention import CAUSAL
from megatron_sgt.arch.head_layout import HeadLayout
from megatron_sgt.config import Config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.model.core_attention import SGTCoreAttention
from megatron_sgt.model.entropy_meter import EntropyMeter
from megatron_sgt.model.layer import SGTLayer
from megatron_sgt.model.linear import LoopingColumnParallelLinear, LoopingRowParallelLinear
from megatron_sgt.model.loop_pass import LoopOptions
from megatron_sgt.model.mlp import ffn_module
from megatron_sgt.model.norm import NORMS, AllHeadsNorm, HeadNorm
from megatron_sgt.ops.rotary import RotaryTables


def causal_attention(config: Config, meter: EntropyMeter, fused: bool, fused_rotary: bool) -> ModuleSpec:
    """Megatron-Core's projections around this project's core attention."""
    query_norm, key_norm = _head_norms(config.model)
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=LoopingColumnParallelLinear,
            core_attention=partial(
                SGTCoreAttention,
                meter=meter,
                recompute=config.recomputed_layers("selective"),
                fused=fused,
                loop_attention=config.train.loop_attention,
                fused_rotary=fused_rotary,
            ),
            linear_proj=LoopingRowParallelLinear,
            q_layernorm=query_norm,
            k_layernorm=key_norm,
        ),
    )


def _head_norms(model: ModelConfig) -> tuple[type | ModuleSpec | None, type | ModuleSpec | None]:
    """The norms of queries and keys."""
    if not model.qk_layernorm:
        return None, None
    if not model.norms_all_heads:
        return HeadNorm, HeadNorm
    query, key = (
        ModuleSpec(module=AllHeadsNorm, params={"heads": heads})
        for heads in (model.num_attention_heads, model.num_query_groups)
    )
    return query, key


ATTENTIONS = {"causal": causal_attention}
"""How each kind of attention is built, by the name that its record in ``arch.attention`` gives."""


def layer_submodules(
    config: Config, meter: EntropyMeter, fused: bool = False, fused_rotary: bool = False
) -> TransformerLayerSubmodules:
    """The parts of one layer, the same for SGT and for a plain Megatron-Core layer.

    Norms of outputs have no slot there: SGTLayer makes them.
    """
    norm = NORMS[config.model.normalization] if config.model.norm_position == "input" else Identity
    return TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ATTENTIONS[CAUSAL.module](config, meter, fused, fused_rotary),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=ffn_module(config.model).spec,
        mlp_bda=get_bias_dropout_add,
    )


def decoder_spec(
    config: Config,
    meter: EntropyMeter,
    layout: HeadLayout,
    plain: bool = False,
    fused: bool = False,
    fused_rotary: bool = False,
    num_layers: int | None = None,
    attention_factor: float = 1.0,
) -> TransformerBlockSubmodules:
    """Spec of the whole decoder, or of a chunk of it.

    Args:
        plain: use Megatron-Core's own TransformerLayer instead of SGTLayer: the yardstick for the tests that
            vanilla training through this project is Megatron-Core bit for bit.
        fused: loop kept heads through the fused operations (see ``loop_backend``).
        fused_rotary: apply rotary positions in one compiled function (``ops.rotary``).
        num_layers: of the chunk; None: the model's.
        attention_factor: of scaled rotary positions (``rotary.scaled_frequencies``); plain layers know none.
    """
    params: dict[str, Any] = {}
    assert not plain or config.model.norm_position == "input", "Megatron-Core's own layer has no norms of outputs"
    if not plain:
        output_norm = NORMS[config.model.normalization] if config.model.norm_position == "output" else None
        params = {
            "output_norm": output_norm,
            "loop_options": LoopOptions.of(config, layout, fused),
            "recompute": config.recomputed_layers("full"),
            "tables": RotaryTables(attention_factor),
        }
    layer = ModuleSpec(
        module=TransformerLayer if plain else SGTLayer,
        params=params,
        submodules=layer_submodules(config, meter, fused, fused_rotary),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * (config.model.num_layers if num_layers is None else num_layers),
        layer_norm=NORMS[config.model.normalization],
    )
