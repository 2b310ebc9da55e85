"""From a configuration to a job in Slurm's queue. Never imports torch: a login node needs pydantic and PyYAML (L5)."""
