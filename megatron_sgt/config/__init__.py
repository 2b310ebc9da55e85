"""Typed, frozen configuration of a run. Never imports torch, so that a login node can validate and plan."""

from megatron_sgt.config.data import DataConfig, TokenizerConfig
from megatron_sgt.config.growth import GrowthConfig
from megatron_sgt.config.loader import load_config, parse_config, recorded_config
from megatron_sgt.config.model import ModelConfig
from megatron_sgt.config.optim import OptimConfig
from megatron_sgt.config.parallel import ParallelConfig
from megatron_sgt.config.root import Config
from megatron_sgt.config.run import CheckpointConfig, LoggingConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "GrowthConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "TokenizerConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
    "recorded_config",
]
