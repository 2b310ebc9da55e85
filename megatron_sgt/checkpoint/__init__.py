"""Checkpoints in DeepSpeed's file names, committed so that a readable one is always whole (L4)."""
