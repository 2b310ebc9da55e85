"""MIDAS: a copy of the middle block, right after it (arXiv 2409.19044).

With n blocks of b layers, block ceil(n / 2) (from 1) is copied and inserted after itself. From one block to six this
copies the blocks 0, 0, 1, 1, 2 (from 0) and ends with the lineage b0, b2 <- b0, b4 <- b2, b5 <- b4, b3 <- b2, b1 <- b0.

Moments go with their layer and the learning rate goes on, as in a re-implementation by others; the authors' own choice
is not published. The function changes at once.
"""

from __future__ import annotations

from pydantic import Field

from megatron_sgt.config.base import Section
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.stages.growth import Growth, Operator, blocks_of, repeated


class Options(Section):
    """Settings of the methods that copy a block."""

    block_size: int = Field(default=4, gt=0, description="Layers of a block; the number of layers is a multiple of it.")


def grow(model: ModelConfig, options: Options) -> Growth:
    """Copy the middle block."""
    middle = -(-blocks_of(model, options.block_size) // 2) - 1
    return repeated(model, middle * options.block_size, options.block_size)


OPERATOR = Operator(
    "midas", "a copy of the middle block of BLOCK_SIZE layers after it", Options, grow, "copy", "continue"
)
