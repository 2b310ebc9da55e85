"""What a run will cost, in closed form: FLOPs, memory, traffic, time. Pure; never imports torch, runs nothing.

Read parameters -> flops -> loop_cost -> traffic -> memory -> hardware -> step_time. Each formula is tested against
what the program really does: docs/planning.md says how, and how far it may be off.
"""
