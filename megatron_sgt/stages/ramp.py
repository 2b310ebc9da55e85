"""MSG's mask, which fades in new layers and feed-forward units (arXiv 2305.02869; cofe-ai/MSG). No torch.

    m = min(1, k / N)    k: optimizer steps applied since the model grew
    a new layer          x + m · F(x), for attention, its loops, and the feed-forward layer
    a new unit           down(act(m · gate(x)) · up(x)); without a gate down(act(m · up(x)))

The authors multiply what enters the activation (and their layers, which normalise last, are m · F(x) + (1 - m) · x).
Of a gated unit this is the gate alone: at m = 0 it is exactly 0, and it grows in proportion to m as theirs does (m² if
both halves were multiplied). With s = act(m · gate), d the gradient of what down reads:

    down    s · up              0 at m = 0, and so are all gradients of the unit: the first step after the growth moves
    gate    m · act'(..) · up · d        new units by weight decay alone
    up      s · d

The same holds for all weights of a new layer, whose every gradient has the factor m. New units of a new layer get both.

m is a function of the applied step, so there is nothing to save: a step without a finite gradient does not advance it,
and micro-batches do not count. At m = 1 nothing is multiplied any more.

A mask is exact in the weights, too: rows of gate times m, and all that a new layer writes times m (``masked_weights``),
or where it normalises what it writes (``model.norm_position: output``), the weights of these norms.
This is how a checkpoint from inside a ramp is exported.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgt.arch.ffn import ffn_kind
from megatron_sgt.arch.weight import Weight
from megatron_sgt.arch.weights import ends_branch, layer_weights
from megatron_sgt.config.growth import RampConfig
from megatron_sgt.config.model import ModelConfig


def mask_at(ramp: RampConfig | None, step: int) -> float:
    """m after ``step`` applied steps of the run; 1 without a ramp."""
    if ramp is None:
        return 1.0
    return min(1.0, max(0, step - ramp.first) / ramp.steps)


@dataclass(frozen=True)
class Masked:
    """What m multiplies of a parameter, or of its module's outputs.

    ``weight``: the parameter. ``rows``: by tensor (see ``Weight.hf``), the first row that is multiplied, with all that
    follow; None: no row.
    """

    weight: Weight
    rows: tuple[int | None, ...]


def masked_weights(model: ModelConfig, ramp: RampConfig) -> dict[str, Masked]:
    """Every parameter of which m multiplies something, by its Megatron name."""
    found = {}
    for layer in range(model.num_layers):
        for weight in layer_weights(model, layer):
            rows: tuple[int | None, ...] = ()
            if layer in ramp.layers and ends_branch(weight, model):
                rows = (0,) * len(weight.hf)
            elif ramp.old_units is not None:
                rows = _new_rows(weight, model, ramp.old_units)
            if any(row is not None for row in rows):
                found[weight.megatron] = Masked(weight, rows)
    return found


def masks_units(masked: Masked) -> bool:
    """Whether it is of units, which its module puts out, and not of what a layer writes."""
    return masked.weight.part == "mlp" and masked.weight.split == "rows"


def _new_rows(weight: Weight, model: ModelConfig, old_units: int) -> tuple[int | None, ...]:
    activated = ffn_kind(model.activation).activated if weight.part == "mlp" and weight.split == "rows" else ()
    modules = (name.rsplit(".", 2)[-2] for name in weight.hf)
    return tuple(old_units if module in activated else None for module in modules)
