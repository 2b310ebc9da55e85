"""What a process must do before it imports DeepSpeed and starts CUDA."""

from __future__ import annotations

import resource
import sys

from megatron_sgt.compat.deepspeed_cpu import choose_accelerator
from megatron_sgt.config import Config
from megatron_sgt.launch.job_environment import set_environment
from megatron_sgt.launch.rank_info import RankInfo
from megatron_sgt.parallel.device import device_type


def prepare_process(config: Config, info: RankInfo) -> None:
    """Set the environment and the limits of this rank and choose DeepSpeed's accelerator. A second call has no effect.

    Raises:
        ConfigError: parallel.device asks for a GPU that is not there.
    """
    kind = device_type(config.parallel.device)
    set_environment(config, info, gpus=kind != "cpu")
    # InfiniBand locks the memory that it sends from.
    most = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (most, most))
    overruled = choose_accelerator(kind)
    if overruled is not None and info.rank == 0:
        print(
            f"warning: DS_ACCELERATOR={overruled} in the environment is ignored: parallel.device decides, here {kind}",
            file=sys.stderr,
        )
