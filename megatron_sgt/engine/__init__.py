"""Training: DeepSpeed engine, step, hooks and the loop (L5)."""
