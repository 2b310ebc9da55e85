"""G_stack: the whole stack of layers, several times (arXiv 2405.15319; code: tongxuluo/prts).

    M_new = M ∘ M ∘ ... ∘ M      new layer i is old layer i mod l; embedding, last norm and output as they are

The authors grow once, by 4, and start the optimizer and its warm-up anew (only the weights are loaded there). The
function changes at once. CompoundGrow's depth stages are the same map (arXiv 2010.12562).
"""

from __future__ import annotations

from pydantic import Field

from megatron_sgt.config.base import Section
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.stages.growth import Growth, Operator, deeper, resized


class Options(Section):
    """Settings of g_stack."""

    factor: int = Field(default=4, gt=1, description="How often the stack stands in the new model.")


def grow(model: ModelConfig, options: Options) -> Growth:
    """``factor`` stacks, one after the other; the last one is nearest to the output, so that it is the heir."""
    resized(model, num_layers=model.num_layers * options.factor)  # refused before a list of so many is made
    return deeper(model, [*range(model.num_layers)] * options.factor, last=True)


OPERATOR = Operator("g_stack", "the whole stack of layers, FACTOR times", Options, grow, "fresh", "fresh")
