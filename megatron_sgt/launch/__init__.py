"""Finds a process's place in a run, under every launcher. Never imports torch."""

from megatron_sgt.launch.environment import discover
from megatron_sgt.launch.rank_info import RankInfo, to_environ

__all__ = ["RankInfo", "discover", "to_environ"]
