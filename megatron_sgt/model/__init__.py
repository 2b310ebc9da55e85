"""The decoder: Megatron-Core's GPTModel with layers that obey a LoopPlan.

Shape legend (Megatron order): S sequence, B micro-batch, D hidden, N query heads of this rank, G query groups
of this rank, R kept heads of this rank, H head size, L layers, P attention passes (1 + the most loops of a
layer). Activations are [S, B, D].
"""
