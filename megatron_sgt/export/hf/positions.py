"""Positions in a Hugging Face config.json: rotary scaling and sliding windows, as far as a run has the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from megatron_sgt.config.problems import explain
from megatron_sgt.config.rotary import KINDS, NOT_TRAINED, RotaryScaling, settings_of


def rope_of(config: Any) -> dict[str, Any]:
    """Rotary settings under the names of transformers 5, whichever version wrote or reads them."""
    found = getattr(config, "rope_parameters", None)
    if found is not None:
        found = found.get(layer_kinds(config)[0], found)  # OLMo-3 has settings of each kind of layer
        return {"rope_theta": getattr(config, "rope_theta", None), **found}
    scaling = getattr(config, "rope_scaling", None) or {}
    return {"rope_theta": config.rope_theta, **scaling}


def layer_kinds(config: Any) -> list[str]:
    """The kinds of layers that a model has, full attention first."""
    return sorted(set(getattr(config, "layer_types", None) or ("full_attention",)))


def rotary_scaling(config: Any) -> dict[str, Any] | None:
    """The section ``model.rotary_scaling``, without nulls; None: the frequencies are not scaled.

    Call it after ``position_problems`` has found none.
    """
    kind = _kind(config)
    return None if kind == "default" else _section(config, kind).model_dump(exclude_none=True)


def window_of(config: Any) -> int | None:
    """Tokens up to which sliding layers see everything; None: no layer slides."""
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else True
    return getattr(config, "sliding_window", None) if slides else None


def position_problems(config: Any) -> Iterator[str]:
    """Each reason why a run cannot have the positions of ``config``."""
    kind = _kind(config)
    if kind in KINDS:
        try:
            _section(config, kind)
        except ValidationError as error:
            yield from (f"rope_scaling {kind!r}: {line}" for line in explain(error, RotaryScaling))
    elif kind != "default":
        why = NOT_TRAINED.get(kind, f"known are {', '.join(KINDS)}")
        yield f"rope_scaling {kind!r}: {why}"
    factor = rope_of(config).get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    if factor not in (None, 1, 1.0):
        yield f"partial_rotary_factor {factor}: every dimension of a head must rotate"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        yield f"layer_types {', '.join(sorted(kinds))}: only full_attention and sliding_attention are supported"
    window = window_of(config)
    if window is not None and window < 2:
        yield f"sliding_window {window}: a run has sequences of 2 tokens at least, and attends to all of one"


def _kind(config: Any) -> str:
    rope = rope_of(config)
    return rope.get("rope_type") or rope.get("type") or "default"


def _section(config: Any, kind: str) -> RotaryScaling:
    rope, context = rope_of(config), config.max_position_embeddings
    given = {name: rope[name] for name in settings_of(kind) if rope.get(name) is not None}
    if kind != "linear":  # as transformers fills it in
        given.setdefault("original_max_position_embeddings", context)
        given.setdefault("factor", context / given["original_max_position_embeddings"])
    longest = min(context, window_of(config) or context)
    return RotaryScaling.model_validate({"type": kind, **given, "context_length": longest})
