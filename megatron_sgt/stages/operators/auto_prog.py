"""AutoProg: late layers stand twice (arXiv 2203.14509, section 4.1, "MoGrow"; code: changlin31/AutoProg).

From l to m layers, l < m <= 2l, each of the last m - l layers is followed by its copy: 6 to 9 is 0 1 2 3 3 4 4 5 5.

The authors copy from an exponential moving average of the weights (``weights: ema``) and make a new optimizer in each
stage. The function changes at once.
"""

from __future__ import annotations

from pydantic import Field

from megatron_sgt.config.base import Section
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.growth import Growth, Operator, deeper


class Options(Section):
    """Settings of auto_prog."""

    num_layers: int = Field(gt=0, description="Layers of the new model.")


def grow(model: ModelConfig, options: Options) -> Growth:
    """Repeat the last layers.

    Raises:
        ConfigError: the new depth is not above the old one and at most twice it.
    """
    old, new = model.num_layers, options.num_layers
    if not old < new <= 2 * old:
        raise ConfigError(f"num_layers {new}: from {old} layers a model grows to {old + 1} to {2 * old}")
    once = 2 * old - new
    return deeper(model, [*range(once), *(layer for layer in range(once, old) for _ in range(2))])


OPERATOR = Operator("auto_prog", "NUM_LAYERS layers, the last ones twice", Options, grow, "fresh", "fresh")
