"""Scaled rotary positions, under the names that Hugging Face gives their settings."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_sgt.config.base import Section

_OF_TYPE = {
    "linear": (),
    "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("original_max_position_embeddings",),
}
"""Type -> what it needs beside the factor."""
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
"""What yarn may have beside that."""
KINDS = tuple(_OF_TYPE)

NOT_TRAINED = {
    "dynamic": "its frequencies depend on the length of each text, and a training run has one length",
    "longrope": "it has two sets of frequencies and takes one by the length of each text",
    "proportional": "it rotates a part of each head",
    "axial": "its positions have several axes",
}
"""Types that transformers knows and a run cannot have, and why."""


def settings_of(kind: str) -> tuple[str, ...]:
    """The settings, beside ``type``, that change the positions of one of KINDS."""
    return ("factor", *_OF_TYPE[kind], *(_OPTIONAL if kind == "yarn" else ()))


class RotaryScaling(Section):
    """How the frequencies of the rotary embedding are scaled for longer contexts: by transformers' own formulas.

    The names are those of ``rope_parameters`` (``rope_scaling``) in a ``config.json``.
    """

    type: Literal["linear", "llama3", "yarn"] = Field(description="Which formula.")
    factor: float = Field(ge=1, description="How much longer the context becomes.")
    original_max_position_embeddings: int | None = Field(
        default=None, gt=0, description="llama3, yarn: the context in tokens before the scaling."
    )
    low_freq_factor: float | None = Field(
        default=None, gt=0, description="llama3: longer waves than original context / this are scaled by factor."
    )
    high_freq_factor: float | None = Field(
        default=None, gt=0, description="llama3: shorter waves than original context / this are not scaled."
    )
    attention_factor: float | None = Field(
        default=None, gt=0, description="yarn: what cos and sin are multiplied by; null: 0.1 ln(factor) + 1."
    )
    beta_fast: float | None = Field(
        default=None, gt=0, description="yarn: dimensions with more rotations in the original context stay; null: 32."
    )
    beta_slow: float | None = Field(
        default=None, gt=0, description="yarn: dimensions with fewer rotations are divided by factor; null: 1."
    )
    mscale: float | None = Field(
        default=None, gt=0, description="yarn, with mscale_all_dim: in place of the 1 in 0.1 · 1 · ln(factor) + 1."
    )
    mscale_all_dim: float | None = Field(
        default=None, gt=0, description="yarn, with mscale: the attention factor is the ratio of the two."
    )
    truncate: bool | None = Field(
        default=None, description="yarn: round the bounds of the ramp to whole dimensions; null: yes."
    )
    context_length: int | None = Field(
        default=None,
        gt=0,
        description="Tokens that an export names as max_position_embeddings where the run's sequences are shorter; "
        "null: model.seq_length. Changes no position.",
    )

    @field_validator("type", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        if isinstance(value, str) and value in NOT_TRAINED:
            raise ValueError(f"'{value}' cannot be trained: {NOT_TRAINED[value]}; choose one of {', '.join(KINDS)}")
        return value

    def problems(self) -> Iterator[str]:
        for name in _OF_TYPE[self.type]:
            if getattr(self, name) is None:
                yield f"{name}: type {self.type} needs it"
        for name in {name: None for kind in KINDS for name in settings_of(kind)}:
            if name not in settings_of(self.type) and getattr(self, name) is not None:
                yield f"{name}: type {self.type} does not have it; remove it"
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            yield f"high_freq_factor: must be > low_freq_factor {low:g}, got {high:g}"
        if self.beta_fast is not None or self.beta_slow is not None:
            fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0
            if slow > fast:
                yield f"beta_slow: must be <= beta_fast {fast:g}, got {slow:g}"

    def positions(self) -> dict[str, Any]:
        """Everything that changes a position, without nulls."""
        return self.model_dump(include={"type", *settings_of(self.type)}, exclude_none=True)

    def formula(self) -> dict[str, Any]:
        """``positions`` as ``rope_scaling`` in a ``config.json`` has them."""
        values = self.positions()
        return {"rope_type": values.pop("type"), **values}

    def describe(self) -> str:
        """Return "llama3, factor 8 of 8192 tokens"."""
        original = self.original_max_position_embeddings
        return f"{self.type}, factor {self.factor:g}" + (f" of {original} tokens" if original else "")
