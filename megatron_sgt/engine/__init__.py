"""Training: DeepSpeed engine, step, hooks and the loop."""

from megatron_sgt.compat.quiet import quiet_imports

# Before anything imports DeepSpeed or Megatron-Core: both print on import.
quiet_imports()
