"""The growth schedule: pure rules from (step, attention entropies) to a LoopPlan. Never imports torch.

Read plan -> select -> gates -> schedule.
"""

from megatron_sgt.growth.gates import decay
from megatron_sgt.growth.plan import GrowthEvent, LayerPlan, LoopPlan
from megatron_sgt.growth.schedule import GrowthSchedule
from megatron_sgt.growth.select import choose_heads, layer_scores, top_k_layers
from megatron_sgt.growth.static import Schedule, StaticSchedule, build_schedule

__all__ = [
    "GrowthEvent",
    "GrowthSchedule",
    "LayerPlan",
    "LoopPlan",
    "Schedule",
    "StaticSchedule",
    "build_schedule",
    "choose_heads",
    "decay",
    "layer_scores",
    "top_k_layers",
]
