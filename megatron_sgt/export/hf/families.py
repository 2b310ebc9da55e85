"""Reads the config.json of a Hugging Face folder as a model of this project, or names what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sgt.arch.ffn import all_kinds, kind_of_hf
from megatron_sgt.errors import CheckpointError, first_line
from megatron_sgt.export.forms import SERVING, STANDARD, form_of
from megatron_sgt.export.hf.known_families import WHY_REFUSED
from megatron_sgt.export.hf.loading import own_class
from megatron_sgt.export.hf.positions import layer_kinds, position_problems, rope_of, rotary_scaling, window_of

CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class HFModel:
    """A folder's model. ``fields``: of the section model; ``loops``: of an SGT model, as its config has them.

    ``window``: of its sliding layers, in tokens. Up to that length they see everything, as every layer here does.
    """

    model_type: str
    fields: dict[str, Any]
    max_position_embeddings: int
    loops: dict[str, dict[str, Any]] = field(default_factory=dict)
    window: int | None = None

    def window_problem(self, seq_length: int) -> str | None:
        """Why sequences of this length would be attended to otherwise than by the model itself; None: they are not."""
        if self.window is None or seq_length <= self.window:
            return None
        return f"{seq_length} tokens are more than sliding_window {self.window}, beyond which the model sees a part"


def read_model(folder: Path) -> HFModel:
    """The model that ``folder`` holds.

    Raises:
        CheckpointError: it has no readable config.json, or one of a model that this project cannot train; every
            reason is named.
    """
    config = read_config(folder)
    family = _FAMILIES.get(config.model_type)
    if family is None:
        why = WHY_REFUSED.get(config.model_type)
        known = ", ".join(sorted(_FAMILIES))
        raise CheckpointError(
            f"{folder} holds a model of type {config.model_type!r}, which cannot be imported"
            + (f": {why}" if why else "")
            + f"; known types: {known}"
        )
    problems = [*_common_problems(config), *family.problems(config)]
    if problems:
        raise CheckpointError(f"{folder} cannot be imported: {'; '.join(problems)}")
    fields = {**_common_fields(config), **family.fields(config)}
    loops = getattr(config, "sgt_loops", {})
    return HFModel(config.model_type, fields, config.max_position_embeddings, loops, window_of(config))


def read_config(folder: Path) -> Any:
    """The transformers configuration of ``folder``; never runs code of the folder.

    Raises:
        CheckpointError: there is none, or one that transformers does not understand.
    """
    import json

    from transformers import AutoConfig

    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_type = values.get("model_type")
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is no Hugging Face model folder: it has no {CONFIG_FILE}") from error
    except AttributeError as error:
        raise CheckpointError(f"{path} is no JSON object; copy it again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; copy it again") from error
    if model_type is None:
        raise CheckpointError(f"{path} names no model_type: it is not a model that transformers has saved")
    try:
        if form := form_of(model_type):
            return own_class(form, "AutoConfig").from_pretrained(folder)
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # unusual values may raise anything in the library
        raise CheckpointError(f"{path} cannot be used (model_type {model_type!r}): {first_line(error)}") from error


def _common_problems(config: Any) -> Iterator[str]:
    if getattr(config, "quantization_config", None) is not None:
        yield "quantization_config: quantised weights cannot be trained; give the original weights"
    gated, act = _ffn(config)
    if kind_of_hf(gated, act) is None:
        known = " or ".join(repr(kind.hidden_act) for kind in all_kinds().values() if kind.gated == gated)
        yield f"hidden_act {act!r} with gated_mlp {gated}: must be {known}"
    yield from position_problems(config)
    wanted = f"{config.model_type.replace('_', '')}forcausallm"
    named = [name for name in config.architectures or () if name.lower() != wanted]
    if named:
        yield f"architectures {', '.join(named)}: only the causal language model can be trained"


def _common_fields(config: Any) -> dict[str, Any]:
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "activation": kind_of_hf(*_ffn(config)),
        "ffn_hidden_size": config.intermediate_size,
        "num_query_groups": config.num_key_value_heads or config.num_attention_heads,
        "kv_channels": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": float(config.rms_norm_eps),
        "rotary_base": float(rope_of(config)["rope_theta"]),
        "rotary_scaling": rotary_scaling(config),
        "norm_position": "input",
        "qk_layernorm": False,
        "qk_layernorm_over": "head",
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "init_method_std": float(config.initializer_range),
        "attention_dropout": float(config.attention_dropout),
    }


def _ffn(config: Any) -> tuple[bool, str]:
    return getattr(config, "gated_mlp", True), {"swish": "silu"}.get(config.hidden_act, config.hidden_act)


def _attention_bias_problem(config: Any) -> Iterator[str]:
    """For families whose attention_bias means q, k, v and o."""
    attention, mlp = config.attention_bias, getattr(config, "mlp_bias", False)
    if attention != mlp:
        yield (
            f"attention_bias {attention} and mlp_bias {mlp}: biases are supported in all projections, in none, "
            "or in q/k/v alone"
        )


def _sgt_problems(config: Any) -> Iterator[str]:
    if not config.attention_bias and (config.attention_out_bias or config.mlp_bias):
        yield "attention_out_bias and mlp_bias without attention_bias: are not supported"
    if config.attention_out_bias != config.mlp_bias:
        yield f"attention_out_bias {config.attention_out_bias} and mlp_bias {config.mlp_bias}: must be equal"
    for layer, loop in config.sgt_loops.items():
        if loop.get("other_gate"):
            yield (
                f"sgt_loops of layer {layer}: other_gate {loop['other_gate']}, exported inside a decay window; "
                "export again with inference gates"
            )


def _llama(config: Any) -> dict[str, Any]:
    return {"add_bias_linear": config.attention_bias}


def _qwen2(config: Any) -> dict[str, Any]:
    return {"add_qkv_bias": True}


def _qwen3(config: Any) -> dict[str, Any]:
    return {"qk_layernorm": True}


def _olmo2(config: Any) -> dict[str, Any]:
    return {"norm_position": "output", "qk_layernorm": True, "qk_layernorm_over": "all"}


def _olmo3_problems(config: Any) -> Iterator[str]:
    yield from _olmo2_problems(config)
    kinds = layer_kinds(config)
    by_kind = getattr(config, "rope_parameters", None)
    if by_kind is None:  # transformers 4: only full attention is scaled
        differ = getattr(config, "rope_scaling", None) is not None
    else:
        differ = by_kind[kinds[0]] != by_kind[kinds[-1]]
    if len(kinds) > 1 and differ:
        yield f"rotary positions of {' and '.join(kinds)} differ: all layers rotate alike here"


def _olmo2_problems(config: Any) -> Iterator[str]:
    if config.attention_bias:
        yield "attention_bias True: the MLP has none, and biases in attention alone are not supported"


def _sgt(config: Any) -> dict[str, Any]:
    return {
        "normalization": config.normalization,
        "norm_position": config.norm_position,
        "qk_layernorm": config.qk_norm,
        "qk_layernorm_over": config.qk_norm_over,
        "add_bias_linear": config.mlp_bias,
        "add_qkv_bias": config.attention_bias and not config.mlp_bias,
    }


def _sgt_serving(config: Any) -> dict[str, Any]:
    return {**_sgt(config), "num_layers": config.sgt_num_layers}


@dataclass(frozen=True)
class _Family:
    """What one model_type has beside the common fields, and what of its options cannot be represented."""

    fields: Callable[[Any], dict[str, Any]]
    problems: Callable[[Any], Iterator[str]]


_FAMILIES = {
    "llama": _Family(_llama, _attention_bias_problem),
    "mistral": _Family(lambda config: {}, lambda config: iter(())),
    "qwen2": _Family(_qwen2, lambda config: iter(())),
    "qwen3": _Family(_qwen3, _attention_bias_problem),
    "olmo2": _Family(_olmo2, _olmo2_problems),
    "olmo3": _Family(_olmo2, _olmo3_problems),
    STANDARD.model_type: _Family(_sgt, _sgt_problems),
    SERVING.model_type: _Family(_sgt_serving, _sgt_problems),
}
