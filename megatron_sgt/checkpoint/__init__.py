"""Checkpoints in DeepSpeed's file names, committed so that every readable checkpoint is complete."""
