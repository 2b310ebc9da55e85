"""MSG: the width of the residual stream, of feed-forward layers, heads and layers (arXiv 2305.02869; cofe-ai/MSG).

Old weights stand first, and the function is preserved from the first step on, without the authors' masks, whose ramp
from 0 to 1 they need because there new entries of all matrices are random:

* what reads new dimensions or makes new units (gate, up, q, k, v, output) is random; what writes new dimensions or
  reads new units (embedding, o, down) is zero. Gate, up and down all zero would never train: all gradients are zero.
* RMSNorm over D_new dimensions, of which D_old are not zero, divides by a root mean square that is smaller by
  sqrt(D_old / D_new): weights of norms get this factor and epsilon is multiplied by D_old / D_new. (Norms of queries
  and keys share epsilon: rows of q and k get the factor, too, so that nothing changes there.)
* new layer i is a copy of layer i mod l whose o and down are zero; under ``model.norm_position: output``, where a norm
  follows them, the weights of its norms.

With ``ramp_steps`` feed-forward layers and depth grow as the authors' do: new units are random in all matrices, new
layers are whole copies, and a mask fades both in (stages/ramp.py). Their masks of norms, which wider streams and more
heads need, are not here.

Heads keep their size. LayerNorm subtracts a mean, which new dimensions change: a wider residual stream is refused then.

The authors keep the step and give new entries zero moments, which is safe up to adam_beta2 0.98 only (optimizer.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from megatron_sgt.arch.ffn import ffn_kind
from megatron_sgt.config.base import Section
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.growth import Growth, Operator, Ramp, resized


class Options(Section):
    """Settings of msg: sizes of the new model, null: as before."""

    hidden_size: int | None = Field(default=None, gt=0, description="Width of the residual stream.")
    ffn_hidden_size: int | None = Field(default=None, gt=0, description="Width inside the feed-forward layers.")
    num_attention_heads: int | None = Field(default=None, gt=0, description="Query heads, each of the old size.")
    num_query_groups: int | None = Field(
        default=None, gt=0, description="Key/value heads; null: as many query heads for each as before."
    )
    num_layers: int | None = Field(default=None, gt=0, description="Layers.")
    ramp_steps: int = Field(
        default=0,
        ge=0,
        description="Steps over which a mask fades in new feed-forward units and layers, as in the source; 0: no mask, "
        "new parts write nothing at first.",
    )

    @property
    def sizes(self) -> dict[str, int]:
        """The sizes that are given."""
        return {name: size for name, size in self if name != "ramp_steps" and size is not None}

    def problems(self) -> Iterator[str]:
        if not self.sizes:
            names = [name for name in type(self).model_fields if name != "ramp_steps"]
            yield "num_layers: nothing grows; give the size that shall: " + ", ".join(names)


def grow(model: ModelConfig, options: Options) -> Growth:
    """Widen and deepen.

    Raises:
        ConfigError: a size that is smaller than before, or that cannot grow in this model.
    """
    sizes = options.sizes
    for name, size in sizes.items():
        if size < getattr(model, name):
            raise ConfigError(f"{name} {size}: is below the {getattr(model, name)} of this model, which can only grow")
    sizes |= _groups(model, options)
    new = resized(model, **sizes)
    widths = {
        name: _first(getattr(model, name), getattr(new, name))
        for name in ("hidden_size", "ffn_hidden_size")
        if getattr(new, name) > getattr(model, name)
    }
    if (new.num_attention_heads, new.num_query_groups) != (model.num_attention_heads, model.num_query_groups):
        widths |= _heads(model, new)
    if "hidden_size" in widths:
        if model.normalization != "RMSNorm":
            raise ConfigError(f"hidden_size: grows under RMSNorm only, this model has {model.normalization}")
        epsilon = model.layernorm_epsilon * model.hidden_size / new.hidden_size
        short = float(f"{epsilon:.12g}")  # 1e-05, and not the number next to it that products give
        new = resized(new, layernorm_epsilon=short if abs(short / epsilon - 1) < 1e-14 else epsilon)
    old_layers = model.num_layers
    ramp = _ramp(model, new, options.ramp_steps) if options.ramp_steps else None
    layers = tuple(n % old_layers for n in range(new.num_layers))
    if len(layers) == old_layers and not widths:
        raise ConfigError("nothing grows: the model has these sizes already")
    return Growth(
        old=model,
        new=new,
        layers=layers,
        heirs=tuple(range(old_layers)),
        silent=frozenset() if ramp else frozenset(range(old_layers, new.num_layers)),
        widths=widths,
        preserves=True,
        ramp=ramp,
    )


def _ramp(model: ModelConfig, new: ModelConfig, steps: int) -> Ramp:
    """How ``new`` is faded in.

    Raises:
        ConfigError: a mask cannot fade in what grows.
    """
    for name in ("hidden_size", "num_attention_heads", "num_query_groups"):
        if getattr(new, name) > getattr(model, name):
            raise ConfigError(
                f"ramp_steps {steps}: a mask fades in ffn_hidden_size and num_layers alone, and {name} grows too; set "
                "ramp_steps 0, which needs no mask, or let it grow in a stage of its own"
            )
    wider = new.ffn_hidden_size > model.ffn_hidden_size
    if wider and not ffn_kind(model.activation).activated:
        raise ConfigError(
            f"ramp_steps {steps}: the record of activation {model.activation} does not say where its units are "
            "activated, so that no mask can fade new ones in; set ramp_steps 0"
        )
    return Ramp(steps, tuple(range(model.num_layers, new.num_layers)), model.ffn_hidden_size if wider else None)


def _first(old: int, new: int) -> tuple[int, ...]:
    """The old units, then new ones."""
    return (*range(old), *[-1] * (new - old))


def _groups(model: ModelConfig, options: Options) -> dict[str, int]:
    """The number of key/value heads, where more query heads determine it."""
    heads = options.num_attention_heads
    if heads is None or options.num_query_groups is not None:
        return {}
    per_group = model.num_attention_heads // model.num_query_groups
    if heads % per_group:
        raise ConfigError(
            f"num_attention_heads {heads}: is no multiple of the {per_group} that share a key/value head; give "
            "num_query_groups"
        )
    return {"num_query_groups": heads // per_group}


def _heads(model: ModelConfig, new: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Old heads stay with their keys and values; a group may get new members, which moves the heads after it."""
    before = model.num_attention_heads // model.num_query_groups
    now = new.num_attention_heads // new.num_query_groups
    if now < before:
        raise ConfigError(
            f"num_query_groups {new.num_query_groups}: leaves {now} of {before} query heads for each, and none can go"
        )
    places = [divmod(head, now) for head in range(new.num_attention_heads)]
    old = (g * before + j if g < model.num_query_groups and j < before else -1 for g, j in places)
    return {
        "num_attention_heads": tuple(old),
        "num_query_groups": _first(model.num_query_groups, new.num_query_groups),
    }


OPERATOR = Operator("msg", "wider and deeper, computing the same at first", Options, grow, "scaled", "continue")
