"""GradStack: a copy of the last block at the end (arXiv 2409.19044, section 2).

With n blocks of b layers the new model is B_1 ... B_n B_n. The rest as in midas.py.
"""

from __future__ import annotations

from megatron_sgt.config.model import ModelConfig
from megatron_sgt.stages.growth import Growth, Operator, blocks_of, repeated
from megatron_sgt.stages.operators.midas import Options


def grow(model: ModelConfig, options: Options) -> Growth:
    """Copy the last block."""
    blocks_of(model, options.block_size)
    return repeated(model, model.num_layers - options.block_size, options.block_size)


OPERATOR = Operator("grad_stack", "a copy of the last BLOCK_SIZE layers at the end", Options, grow, "copy", "continue")
