"""What a method of growth decides, before any tensor is looked at. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import ValidationError

from megatron_sgt.config.base import Section
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.config.problems import explain
from megatron_sgt.errors import ConfigError

WIDTHS = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
"""The sizes of a model that can grow, beside its layers. The size of a head stays."""


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """All sizes of ``model`` that can grow, as records tell them."""
    return {name: getattr(model, name) for name in ("num_layers", *WIDTHS)}


@dataclass(frozen=True)
class Ramp:
    """New parts that a mask fades in (ramp.py), in the first ``steps`` steps of the grown model.

    ``layers``: the new ones. ``old_units``: of each feed-forward layer, in front of new ones; None: there are none.
    """

    steps: int
    layers: tuple[int, ...]
    old_units: int | None


@dataclass(frozen=True)
class Growth:
    """From the model ``old`` to the model ``new``.

    Attributes:
        layers: the old layer that each new one is a copy of.
        heirs: for each old layer the copy that goes on in its role, where only one can (a looping layer).
        silent: new layers that write nothing into the residual stream yet, so that they change nothing.
        widths: per grown size of WIDTHS, the old unit that each new one is a copy of; -1: of none.
        noise: of what repeated units write, in proportion to its root mean square; its sum over copies is zero.
        preserves: whether ``new`` computes what ``old`` does.
        ramp: how ``new`` is faded in; then new units are random throughout, and new layers write at once.
    """

    old: ModelConfig
    new: ModelConfig
    layers: tuple[int, ...]
    heirs: tuple[int, ...]
    silent: frozenset[int] = frozenset()
    widths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    noise: float = 0.0
    preserves: bool = False
    ramp: Ramp | None = None

    @property
    def heads(self) -> tuple[int, ...]:
        """The old head that each new one is a copy of; -1: of none."""
        return self.widths.get("num_attention_heads", tuple(range(self.old.num_attention_heads)))

    @property
    def with_a_vocabulary(self) -> Growth:
        """The same where the tokenizer is not known yet, for what does not depend on it."""
        if self.old.vocab_size is not None:
            return self
        old, new = (model.model_copy(update={"vocab_size": 1}) for model in (self.old, self.new))
        return replace(self, old=old, new=new)

    @property
    def copies_of_layer(self) -> tuple[tuple[int, ...], ...]:
        """The new layers that each old one has become."""
        old = range(self.old.num_layers)
        return tuple(tuple(n for n, source in enumerate(self.layers) if source == layer) for layer in old)


@dataclass(frozen=True)
class Operator:
    """A method of growth.

    ``Options``: its settings. ``grow``: from a model and valid options to a ``Growth``. ``moments``, ``optimizer``:
    what its source does with AdamW's state, see optimizer.py. ``summary``: for people.
    """

    name: str
    summary: str
    Options: type[Section]
    grow: Callable[[ModelConfig, Any], Growth]
    moments: str
    optimizer: str

    def __call__(self, model: ModelConfig, options: Mapping[str, Any]) -> Growth:
        """Grow ``model``.

        Raises:
            ConfigError: the options are wrong, or do not fit ``model``.
        """
        try:
            valid = self.Options.model_validate(dict(options))
        except ValidationError as error:
            raise ConfigError(f"{self.name}: " + "; ".join(explain(error, self.Options))) from None
        try:
            return self.grow(model, valid)
        except ConfigError as error:
            raise ConfigError(f"{self.name}: {error}") from None


def deeper(model: ModelConfig, layers: Sequence[int], *, last: bool = False) -> Growth:
    """A model that is made of whole layers of ``model``, each at least once.

    Args:
        layers: the old layer of each new one.
        last: the last copy of a layer is its heir, and not the first.
    """
    found = list(layers)
    heirs = [
        len(found) - 1 - found[::-1].index(layer) if last else found.index(layer) for layer in range(model.num_layers)
    ]
    return Growth(model, resized(model, num_layers=len(found)), tuple(found), tuple(heirs))


def repeated(model: ModelConfig, first: int, count: int) -> Growth:
    """A model in which the layers ``first`` to ``first + count - 1`` stand twice, one copy right after the other."""
    end = first + count
    return deeper(model, [*range(end), *range(first, model.num_layers)])


def blocks_of(model: ModelConfig, block_size: int) -> int:
    """How many blocks of ``block_size`` layers ``model`` has.

    Raises:
        ConfigError: it has no whole number of them.
    """
    if model.num_layers % block_size:
        raise ConfigError(
            f"num_layers {model.num_layers} is no multiple of block_size {block_size}; choose one that divides it"
        )
    return model.num_layers // block_size


def resized(model: ModelConfig, **sizes: Any) -> ModelConfig:
    """``model`` with other sizes; what is derived from them elsewhere stays.

    Raises:
        ConfigError: no model has these sizes.
    """
    try:
        return ModelConfig.model_validate({**model.model_dump(), **sizes})
    except ValidationError as error:
        raise ConfigError("; ".join(explain(error, ModelConfig))) from None
