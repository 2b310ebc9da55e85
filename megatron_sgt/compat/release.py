"""Lets go of an engine: what DeepSpeed and Megatron-Core keep of one that nobody uses any more is memory lost.

Of a dropped engine at ZeRO-3 two things of DeepSpeed would keep the model, and one of Megatron-Core at any stage:
a stack of modules that is never emptied, the cache of a method whose keys are the objects that it is called on, and
such a cache of the rotary embedding. Without ``destroy`` hooks of parameters keep the buckets of gradients.
"""

from __future__ import annotations

from typing import Any

import deepspeed
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding


def release_engine(engine: deepspeed.DeepSpeedEngine) -> None:
    """End the use of ``engine``: once the caller has dropped it, the garbage collector frees it and its model.

    There may be no other engine in the process.
    """
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    for cached in (_params_to_release(), RotaryEmbedding.forward):
        cached.cache_clear()


def _params_to_release() -> Any:
    """The cached method inside DeepSpeed's wrapper, which measures its time."""
    wrapper = vars(PartitionedParameterCoordinator)["_PartitionedParameterCoordinator__params_to_release"]
    inside = [cell.cell_contents for cell in wrapper.__closure__ or ()]
    return next(content for content in [wrapper, *inside] if hasattr(content, "cache_clear"))
