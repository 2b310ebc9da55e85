"""LIDAS: as MIDAS, but the copied layers lie in the middle of the stack, whatever block they are of (arXiv 2512.08819).

Of blocks of b layers, the last b/2 layers of the middle one, ceil(n / 2) from 1, and the first b/2 of the one after it
are copied. The paper's text was not at hand: which layers is taken from its public reviews; that the copy stands right
after them, as in MIDAS, is an assumption. A model of one block has no block after it, and copies that one.
"""

from __future__ import annotations

from megatron_sgt.config.model import ModelConfig
from megatron_sgt.errors import ConfigError
from megatron_sgt.stages.growth import Growth, Operator, blocks_of, repeated
from megatron_sgt.stages.operators.midas import Options


def grow(model: ModelConfig, options: Options) -> Growth:
    """Copy the layers around the end of the middle block.

    Raises:
        ConfigError: a block has no halves, or the model no whole number of blocks.
    """
    size = options.block_size
    blocks = blocks_of(model, size)
    if size % 2:
        raise ConfigError(f"block_size {size} is odd, but half a block is copied from either side; choose an even one")
    end_of_middle = -(-blocks // 2) * size
    return repeated(model, end_of_middle - size // 2 if blocks > 1 else 0, size)


OPERATOR = Operator(
    "lidas", "a copy of the BLOCK_SIZE layers around the end of the middle block", Options, grow, "copy", "continue"
)
