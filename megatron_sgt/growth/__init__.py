"""The growth schedule: pure rules from (step, what was observed) to a LoopPlan. Never imports torch.

Read plan -> schedule -> sgt (with select and gates) -> methods.
"""

from megatron_sgt.growth.gates import decay
from megatron_sgt.growth.methods import build_schedule
from megatron_sgt.growth.plan import GrowthEvent, LayerPlan, LoopPlan
from megatron_sgt.growth.schedule import ENTROPY, Schedule, Stage
from megatron_sgt.growth.select import choose_heads, layer_scores, top_k_layers
from megatron_sgt.growth.sgt import SGTSchedule

__all__ = [
    "ENTROPY",
    "GrowthEvent",
    "LayerPlan",
    "LoopPlan",
    "SGTSchedule",
    "Schedule",
    "Stage",
    "build_schedule",
    "choose_heads",
    "decay",
    "layer_scores",
    "top_k_layers",
]
