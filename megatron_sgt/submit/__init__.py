"""Turns a configuration into a job in Slurm's queue. Never imports torch: a login node needs pydantic and PyYAML."""
