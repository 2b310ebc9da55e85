"""CompoundGrow's split of feed-forward units (arXiv 2010.12562; Net2Net, arXiv 1511.05641).

Unit j of w becomes the units j, w + j, ..., each of which passes on 1/k of what it did: gate and up rows are repeated,
down columns are repeated and divided by k. The function is preserved. Gate and up are repeated each by itself.

Copies with the same weights have the same gradients for ever, so noise tells them apart. Adam is blind to the size of
a gradient, so it must change directions: elements of the down columns get independent noise whose sum over the copies
is zero. The function stays the same, and the copies' gate and up rows get gradients of their own.

The authors make a new optimizer in each stage. The sequence-length curriculum of the paper is no growth of tensors.
"""

from __future__ import annotations

from pydantic import Field

from megatron_sgt.config.base import Section
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.stages.growth import Growth, Operator, resized


class Options(Section):
    """Settings of compound_grow."""

    factor: int = Field(default=4, gt=1, description="How many units each feed-forward unit becomes.")
    noise: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Noise of what the copies pass on, in proportion to its root mean square; 0: they stay equal.",
    )


def grow(model: ModelConfig, options: Options) -> Growth:
    """Repeat every feed-forward unit."""
    width, layers = model.ffn_hidden_size, tuple(range(model.num_layers))
    return Growth(
        old=model,
        new=resized(model, ffn_hidden_size=width * options.factor),
        layers=layers,
        heirs=layers,
        widths={"ffn_hidden_size": tuple(range(width)) * options.factor},
        noise=options.noise,
        preserves=True,
    )


OPERATOR = Operator("compound_grow", "every feed-forward unit as FACTOR units", Options, grow, "fresh", "fresh")
