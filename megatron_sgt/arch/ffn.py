"""One record per kind of feed-forward layer, chosen by ``model.activation``.

An installed package adds a kind by an entry point of the group ``megatron_sgt.ffn``: its name is that of the kind, its
value a record such as those in ``KINDS``. The module of a kind is named by its record and built in ``model/mlp.py``,
so that records are torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sgt import extensions
from megatron_sgt.arch.flops import Flops
from megatron_sgt.arch.weight import Weight, linear
from megatron_sgt.config.model import ModelConfig


@dataclass(frozen=True)
class FFNKind:
    """down(act(gate(x)) · up(x)), or without a gate down(act(up(x))). Tensor-parallel ranks share the inner width.

    A kind of another structure is a subclass with methods of its own. ``layer`` is the index of the layer.

    ``module``: how it is built, an entry of ``model.mlp.FFN_MODULES`` or ``package.module:name`` of one elsewhere.
    ``gated``, ``hidden_act``: how an exported model computes it (``SGTMLP``); ``hidden_act`` None: not at all.
    ``saved``: tensors of the inner width that autograd keeps between the layer's input and its output.
    ``activated``: exported modules whose outputs, one per unit, enter an activation that is 0 at 0: there a mask fades
    new units in (``stages.ramp``); (): not known, so that none can be.
    """

    module: str
    gated: bool
    hidden_act: str | None
    saved: int
    activated: tuple[str, ...] = ()

    def weights(self, model: ModelConfig, layer: int) -> Iterator[Weight]:
        """Its parameters: linear_fc1 holds [gate; up], linear_fc2 is down."""
        hidden, width, bias = model.hidden_size, model.ffn_hidden_size, model.add_bias_linear
        megatron, hf = f"decoder.layers.{layer}.mlp", f"model.layers.{layer}.mlp"
        inputs = ("gate_proj", "up_proj") if self.gated else ("up_proj",)
        rows = {f"{hf}.{name}": (width, hidden) for name in inputs}
        yield from linear(f"{megatron}.linear_fc1", rows, "rows", "mlp", bias)
        yield from linear(f"{megatron}.linear_fc2", {f"{hf}.down_proj": (hidden, width)}, "columns", "mlp", bias)

    def flops(self, model: ModelConfig, layer: int, tokens: int) -> Flops:
        """Operations on ``tokens`` tokens, summed over tensor-parallel ranks: every token meets every matrix."""
        matrices = 3 if self.gated else 2
        return Flops(linear=2 * tokens * model.hidden_size * model.ffn_hidden_size * matrices)

    def saved_elements(self, model: ModelConfig, layer: int, tokens: int) -> int:
        """Elements that autograd keeps inside the layer, on all tensor-parallel ranks together."""
        return self.saved * model.ffn_hidden_size * tokens


KINDS: dict[str, FFNKind] = {
    # Both halves of the product, and the product.
    "swiglu": FFNKind("swiglu", gated=True, hidden_act="silu", saved=3, activated=("gate_proj",)),
    "gelu": FFNKind("gelu", gated=False, hidden_act="gelu", saved=2, activated=("up_proj",)),
}


def ffn_kind(name: str) -> FFNKind:
    """The record of the kind ``name``, built in or installed.

    Raises:
        ConfigError: there is none of that name.
    """
    return KINDS[name] if name in KINDS else extensions.load("ffn", name)


def all_kinds() -> dict[str, FFNKind]:
    """Every kind, the built-in ones first."""
    return KINDS | {name: ffn_kind(name) for name in extensions.names("ffn")}


def kind_of_hf(gated: bool, hidden_act: str) -> str | None:
    """The kind that an exported model with these fields has; None: there is none."""
    for name in (*KINDS, *extensions.names("ffn")):  # an installed one is imported only where none built in fits
        kind = ffn_kind(name)
        if (kind.gated, kind.hidden_act) == (gated, hidden_act):
            return name
    return None
